"""Small pictures with captions, in folders and tars."""

import io
import tarfile

from PIL import Image


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(file, members):
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def captioned(keys, extension="txt"):
    members = {}
    for key in keys:
        members[f"{key}.png"] = png(int(key))
        members[f"{key}.{extension}"] = f"picture {key}"
    return members


def every(source):
    return {source[i]["caption"]: source[i]["image"] for i in range(len(source))}


def write_shards(folder):
    """Three tars of four pictures each."""
    for shard in range(3):
        with open(folder / f"a-{shard:03d}.tar", "wb") as file:
            write_tar(file, captioned([f"{4 * shard + i}" for i in range(4)]))
