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
