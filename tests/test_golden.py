"""The stored reference arrays are what their script makes of the peers of today."""

import numpy as np
import pytest

from tests.golden import peer


@pytest.mark.parity
@pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler"])
def test_golden_arrays_are_reproduced(name):
    from tests.golden import make

    stored, fresh = peer.load(name), make.MAKERS[name]()
    assert stored.keys() == fresh.keys()
    for key, value in stored.items():
        assert value.dtype == fresh[key].dtype
        np.testing.assert_allclose(fresh[key], value, atol=1e-5, err_msg=key)
