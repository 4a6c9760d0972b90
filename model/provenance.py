"""What a finished mp4 says of its origin: the IPTC digital source type as XMP, and signed Content Credentials (C2PA).

The XMP packet stands in a `uuid` box of its own at the end of the file (XMP specification part 3, MPEG-4), its property
is Iptc4xmpExt:DigitalSourceType (IPTC Video Metadata Hub). The C2PA manifest says the same and is signed with the user's
certificate through the optional package c2pa-python; no time-stamp authority is asked, for that would be a network.
"""

import base64
import binascii
import importlib
import io
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProvenanceError

# IPTC's names: made by a model alone, or with parts that were not, such as a photograph as its first frame
MADE, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
SOURCE_TYPES = (MADE, COMPOSITE)
CERTIFICATE_VARIABLE, KEY_VARIABLE = "LOCKSTEP_C2PA_CERTIFICATE", "LOCKSTEP_C2PA_KEY"
_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_TOOL = "ComfyUI-Lockstep"
_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    Iptc4xmpExt:DigitalSourceType="{source}"
    xmp:CreatorTool="{tool}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
# how a key names its kind inside of its PEM text (RFC 5480, 8017, 8410), and the signature that C2PA takes for it
_ALGORITHMS = {
    bytes.fromhex("06082a8648ce3d030107"): "es256",
    bytes.fromhex("06052b81040022"): "es384",
    bytes.fromhex("06052b81040023"): "es512",
    bytes.fromhex("06092a864886f70d010101"): "ps256",
    bytes.fromhex("06032b6570"): "ed25519",
}


class Signer:
    """The user's certificate, ready to sign mp4 files. Raises ProvenanceError if anything of it is missing or does not fit.

    certificate: PEM file, the user's own certificate first, then those that vouch for it. key: PEM file of its private key.
    A small clip is signed here and now, so that a later one will not fail for want of the right certificate.
    """

    def __init__(self, certificate: str | Path, key: str | Path):
        self._certificate = _read_pem(certificate, b"CERTIFICATE")
        self._key = _read_pem(key, b"PRIVATE KEY")
        self._algorithm = _algorithm_of(self._key, key)
        try:
            self._c2pa: Any = importlib.import_module("c2pa")
        except (ImportError, OSError, RuntimeError) as error:  # its library is of another system
            raise ProvenanceError(
                "Content Credentials need the package c2pa-python, which is not installed: pip install c2pa-python"
            ) from error
        self.sign(io.BytesIO(_smallest_clip()), io.BytesIO(), MADE, "test.mp4")

    def sign(self, source: Any, target: Any, source_type: str, title: str) -> None:
        """Copies an mp4 from one binary stream to another, with a signed manifest. Raises ProvenanceError."""
        action = {
            "action": "c2pa.created",
            "digitalSourceType": _VOCABULARY + source_type,
            "softwareAgent": {"name": _TOOL},
        }
        manifest = {
            "claim_generator_info": [{"name": _TOOL}],
            "title": title,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        c2pa = self._c2pa
        try:
            info = c2pa.C2paSignerInfo(self._algorithm.encode(), self._certificate, self._key, None)
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
                builder.sign(signer, "video/mp4", source, target)
        except c2pa.C2paError as error:
            raise ProvenanceError(
                f"Content Credentials cannot be signed: {' '.join(str(error).split())}"
            ) from error


def find_signer(certificate: Path | None = None, key: Path | None = None) -> Signer:
    """The signer of these files, or of those that the environment names. Raises ProvenanceError if there is none."""
    paths = (
        certificate or os.environ.get(CERTIFICATE_VARIABLE),
        key or os.environ.get(KEY_VARIABLE),
    )
    if not all(paths):
        missing = " and ".join(
            name for name, path in zip((CERTIFICATE_VARIABLE, KEY_VARIABLE), paths, strict=True) if not path
        )
        raise ProvenanceError(
            f"no certificate with its key is configured: set {missing}, or give the command --certificate and "
            "--private-key"
        )
    return Signer(Path(str(paths[0])), Path(str(paths[1])))


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What a file is to say of its origin. Raises ProvenanceError for an unknown source type."""

    source_type: str = MADE
    signer: Signer | None = None

    def __post_init__(self):
        if self.source_type not in SOURCE_TYPES:
            raise ProvenanceError(
                f"unknown digital source type {self.source_type!r}: use {' or '.join(SOURCE_TYPES)}"
            )

    def write(self, path: Path, title: str) -> None:
        """Adds it to a complete mp4. A failure may leave the file half changed: work on a file of your own."""
        packet = _XMP.format(source=_VOCABULARY + self.source_type, tool=_TOOL).encode()
        with open(path, "ab") as file:
            file.write(struct.pack(">I4s16s", 24 + len(packet), b"uuid", _XMP_UUID) + packet)
        if self.signer is None:
            return
        signed = path.with_name(f".{secrets.token_hex(6)}.part")
        try:
            with open(path, "rb") as source, open(signed, "w+b") as target:
                self.signer.sign(source, target, self.source_type, title)
            os.replace(signed, path)
        finally:
            signed.unlink(missing_ok=True)


def _read_pem(path: str | Path, kind: bytes) -> bytes:
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ProvenanceError(f"cannot read {path}: {error.strerror or error}") from error
    if kind + b"-----" not in text:
        raise ProvenanceError(f"{path} holds no {kind.decode().lower()} in PEM form")
    return text


def _algorithm_of(key: bytes, path: str | Path) -> str:
    body = key.partition(b"PRIVATE KEY-----")[2].partition(b"-----END")[0]
    try:
        packed = base64.b64decode(b"".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        packed = b""
    for name, algorithm in _ALGORITHMS.items():
        if name in packed:
            return algorithm
    raise ProvenanceError(
        f"{path} is no key that C2PA can sign with: use an unencrypted PKCS 8 key of P-256, P-384, P-521, Ed25519 or RSA"
    )


def _smallest_clip() -> bytes:
    """Two black frames as mp4."""
    import av  # here: the command's help asks this file for names alone
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()
