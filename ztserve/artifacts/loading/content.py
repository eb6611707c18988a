"""What may be in a model at all: data and safetensors, nothing that can run.

A signature says who made a file, not that it is harmless: pickles, archives and code
are refused even when signed, by suffix and by their first bytes.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from ztserve.artifacts.loading.configuration import (
    INDEX,
    check_config,
    check_index,
)
from ztserve.artifacts.loading.header import Layout, parse_header
from ztserve.artifacts.loading.pickles import calls_something
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import VerificationError

WEIGHTS = ".safetensors"

_PICKLE, _ARCHIVE, _CODE = "a pickle", "an archive", "code"
_FOREIGN = "a foreign format"
_MEND = {
    _PICKLE: "ztserve serves only safetensors; convert it with "
    "safetensors.torch.save_file and sign again",
    _ARCHIVE: "unpack it, keep safetensors and plain data, and sign again",
    _CODE: "a model is data; ship code as the deployment's own, and sign again without",
    _FOREIGN: "ztserve serves only safetensors; convert the weights and sign again",
}
_SUFFIXES = {
    _PICKLE: ".bin .ckpt .dill .joblib .npy .npz .pickle .pkl .pt .pth",
    _ARCHIVE: ".7z .bz2 .gz .jar .mar .nemo .rar .tar .tgz .whl .xz .zip .zst",
    _CODE: ".bat .cu .dll .dylib .exe .ipynb .js .lua .pl .ps1 .ptx .py .pyc .pyd .pyo "
    ".pyw .rb .sh .so .wasm",
    _FOREIGN: ".ggml .gguf .h5 .hdf5 .keras .mlmodel .onnx .pb .tflite",
}
_KIND_OF_SUFFIX = {
    suffix: kind for kind, text in _SUFFIXES.items() for suffix in text.split()
}
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    *((0, bytes((0x80, n)), _PICKLE, "pickle") for n in range(6)),
    (0, b"PK\x03\x04", _PICKLE, "zip"),
    (0, b"PK\x05\x06", _ARCHIVE, "zip"),
    (0, b"\x93NUMPY", _PICKLE, "numpy"),
    (0, b"\x1f\x8b", _ARCHIVE, "gzip"),
    (0, b"BZh", _ARCHIVE, "bzip2"),
    (0, b"\xfd7zXZ\x00", _ARCHIVE, "xz"),
    (0, b"\x28\xb5\x2f\xfd", _ARCHIVE, "zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", _ARCHIVE, "7z"),
    (257, b"ustar", _ARCHIVE, "tar"),
    (0, b"\x7fELF", _CODE, "ELF"),
    (0, b"#!", _CODE, "script"),
    (0, b"\0asm", _CODE, "wasm"),
    (0, b"\x89HDF\r\n", _FOREIGN, "HDF5"),
    (0, b"GGUF", _FOREIGN, "GGUF"),
)


_CONFIGURATION = re.compile(r"(config[^/]*|model_index)\.json\Z", re.IGNORECASE)
"""Also ``config.4.0.0.json``, which transformers reads where config.json says so, and
what diffusers calls its own."""


def check_suffixes(names: Collection[str]) -> None:
    """Raise VerificationError if a name says that its file cannot be served."""
    for name in names:
        # Some file systems drop spaces and dots at the end.
        for suffix in PurePosixPath(name.lower().rstrip(" .")).suffixes[-1:]:
            if suffix in _KIND_OF_SUFFIX:
                _refuse(name, _KIND_OF_SUFFIX[suffix], f"suffix {suffix}")


def check_contents(
    files: Mapping[str, memoryview], sizes: Mapping[str, int] | None = None
) -> Mapping[str, Layout]:
    """Look into every file; return where each weight file's tensors lie.

    Of a weight file that is longer, by `sizes`, than what is given of it, the header
    is looked at and the values are not. Raises VerificationError on pickles, archives,
    code, malformed safetensors, tensor names used twice, indices that are not of these
    files, and configurations that would have code, or another model, fetched.
    """
    check_suffixes(files)
    layouts: dict[str, Layout] = {}
    for name, view in files.items():
        if name.endswith(WEIGHTS):
            layouts[name] = _check_weights(name, view, (sizes or {}).get(name))
        else:
            _check_magic(name, view)
        if _CONFIGURATION.search(name):
            check_config(name, view, files)
    _check_tensor_names(layouts)
    for name, view in files.items():
        if name.endswith(INDEX):
            check_index(name, view, layouts)
    return layouts


def _check_weights(name: str, view: memoryview, size: int | None) -> Layout:
    try:
        return parse_header(view, size)
    except Malformed as error:
        # Only to give the better reason: a sound header may begin like a pickle.
        _check_magic(name, view)
        raise VerificationError(f"{name} is not sound safetensors: {error}") from error


def _check_magic(name: str, view: memoryview) -> None:
    for offset, magic, kind, title in _MAGIC:
        if view[offset : offset + len(magic)] == magic:
            _refuse(name, kind, f"{title} magic")
    if calls_something(view):
        _refuse(name, _PICKLE, "pickle opcodes")


def _refuse(name: str, kind: str, sign: str) -> None:
    raise VerificationError(f"{name} is {kind} ({sign}): {_MEND[kind]}")


def _check_tensor_names(layouts: Mapping[str, Layout]) -> None:
    home: dict[str, str] = {}
    for file, layout in layouts.items():
        for tensor in layout:
            if tensor in home:
                raise VerificationError(
                    f"tensor {tensor!r} is both in {home[tensor]} and in {file}"
                )
            home[tensor] = file
