"""What files say of their origin: workflow and settings, the IPTC source type, signed Content Credentials."""

import datetime
import io
import json
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import av
import pytest
import torch
from PIL import Image

from lockstep.model import cli, provenance
from lockstep.model.errors import MediaError, ProvenanceError
from lockstep.model.media import read_clip, write_clip
from lockstep.model.provenance import COMPOSITE, MADE, SOURCE_TYPES, Disclosure, Signer, find_signer
from lockstep.model.values import Clip, GenerateResult, ModelInfo

IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


def small_clip() -> Clip:
    return Clip(torch.rand(6, 32, 32, 3), torch.zeros(1, 8000), 12.0, 16000)


def boxes(path: Path) -> list[tuple[str, bytes]]:
    """Every box at the top of an mp4, read as the standard says (ISO 14496-12, 4.2)."""
    data, found, place = path.read_bytes(), [], 0
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        assert 8 <= size <= len(data) - place
        found.append((kind.decode(), data[place + 8 : place + size]))
        place += size
    return found


def source_type_of(path: Path) -> str | None:
    """As FFmpeg's own reader finds the packet."""
    with av.open(str(path), options={"export_xmp": "1"}) as container:
        packet = container.metadata.get("xmp")
    if packet is None:
        return None
    return (
        ElementTree.fromstring(packet.strip().removeprefix("\ufeff"))
        .find(".//*[@" + PROPERTY + "]")
        .get(PROPERTY)
    )


@pytest.mark.parametrize("source_type", SOURCE_TYPES)
def test_a_file_says_how_it_came_about(tmp_path, source_type):
    path = tmp_path / "clip.mp4"
    write_clip(path, small_clip(), {"lockstep": "{}"}, Disclosure(source_type))
    assert source_type_of(path) == IPTC + source_type
    assert [kind for kind, _ in boxes(path)][-1] == "uuid"
    assert boxes(path)[-1][1].startswith(bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC"))
    with av.open(str(path)) as container:
        assert container.metadata["lockstep"] == "{}"
    clip = read_clip(path)
    assert (len(clip.frames), clip.waveform.shape) == (6, (1, 8000))


def test_without_disclosure_nothing_is_added(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, small_clip())
    assert "uuid" not in [kind for kind, _ in boxes(path)]
    assert source_type_of(path) is None


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs `lockstep generate` with an engine that paints grey: exit code, the JSON's provenance, stderr."""
    picture = tmp_path / "first.png"
    Image.new("RGB", (8, 8)).save(picture)
    monkeypatch.delenv(provenance.CERTIFICATE_VARIABLE, raising=False)
    monkeypatch.delenv(provenance.KEY_VARIABLE, raising=False)

    class GreyEngine:
        device = torch.device("cpu")

        def __init__(self, *_given, **_named):
            pass

        def generate(self, request, _progress, writer):
            clip, model = small_clip(), ModelInfo("grey", "1.0", "ab" * 32)
            result = GenerateResult(clip, "cd" * 32, {"video": 1.0}, (), request.seed, model)
            writer(iter([clip.frames]), result)
            return result

    monkeypatch.setitem(sys.modules, "lockstep.model.engine", SimpleNamespace(Engine=GreyEngine))

    def run(*arguments):
        code = cli.main(
            ["generate", "a ball", "-o", str(tmp_path / "clip.mp4"), "--json", *map(str, arguments)]
        )
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1])["provenance"] if code == 0 else None, err

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), MADE),
        (("--image", "first.png"), COMPOSITE),
        (("--last-image", "first.png"), COMPOSITE),
        (("--reference", "first.png"), COMPOSITE),
        (("--disclosure", COMPOSITE), COMPOSITE),
        (("--image", "first.png", "--disclosure", MADE), MADE),
        (("--disclosure", "none"), None),
    ],
)
def test_the_command_discloses_unless_told_otherwise(command, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, told, err = command(*arguments)
    assert code == 0
    assert told["digital_source_type"] == said
    assert told["content_credentials"].startswith("not signed: ")
    assert "not signed" not in err  # nobody asked for it
    assert source_type_of(tmp_path / "clip.mp4") == (said and IPTC + said)


def test_the_command_s_settings_are_whole_and_name_no_folders(command, tmp_path):
    picture = tmp_path / "first.png"
    lora = ("--lora", f"{tmp_path}/style.safetensors=0.5", "--upscaler", tmp_path / "up.safetensors")
    assert command("--image", picture, *lora, "--recipe", "hq", "--steps", 3)[0] == 0
    with av.open(str(tmp_path / "clip.mp4")) as container:
        text = container.metadata["lockstep"]
    told = json.loads(text)
    assert (told["image"], told["last_image"], told["recipe"], told["steps"]) == ("first.png", None, "hq", 3)
    assert (told["loras"], told["upscalers"]) == ([["style.safetensors", 0.5]], ["up.safetensors"])
    assert str(tmp_path) not in text


def test_an_unknown_source_type_is_refused_with_those_that_are_known():
    with pytest.raises(ProvenanceError, match=f"use {MADE} or {COMPOSITE}"):
        Disclosure("photograph")


# Content Credentials


@pytest.fixture(scope="session")
def x509():
    """The chains are made here, with the same needs as bought ones: an authority, and a leaf that may sign documents."""
    pytest.importorskip("c2pa", reason="signing needs c2pa-python, which is not installed")
    return pytest.importorskip(
        "cryptography.x509", reason="test certificates need cryptography, which is not installed"
    )


def new_chain(x509, folder: Path, kind: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    def new_key():
        if kind == "rsa":
            return rsa.generate_private_key(65537, 2048)
        return (
            ed25519.Ed25519PrivateKey.generate()
            if kind == "ed25519"
            else ec.generate_private_key(getattr(ec, kind)())
        )

    def new_certificate(name, key, signer, issuer, authority: bool):
        now = datetime.datetime.now(datetime.timezone.utc)
        subject = x509.Name(
            [
                x509.NameAttribute(x509.NameOID.COMMON_NAME, name),
                x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "test"),
            ]
        )
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage
                ),
                True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        )
        if not authority:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False
            )
        return builder.sign(signer, None if kind == "ed25519" else hashes.SHA256())

    authority_key, leaf_key = new_key(), new_key()
    authority = new_certificate("test authority", authority_key, authority_key, None, True)
    leaf = new_certificate("test signer", leaf_key, authority_key, authority.subject, False)
    chain, key = folder / f"{kind}.chain.pem", folder / f"{kind}.key.pem"
    pem = serialization.Encoding.PEM
    chain.write_bytes(leaf.public_bytes(pem) + authority.public_bytes(pem))
    key.write_bytes(
        leaf_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, key


@pytest.fixture(scope="session")
def chain(x509, tmp_path_factory) -> tuple[Path, Path]:
    return new_chain(x509, tmp_path_factory.mktemp("certificates"), "SECP256R1")


def manifest_of(path: Path) -> dict:
    import c2pa

    with open(path, "rb") as file, c2pa.Reader("video/mp4", file) as reader:
        return json.loads(reader.json())


@pytest.mark.parametrize("kind", ["SECP256R1", "SECP384R1", "SECP521R1", "ed25519", "rsa"])
def test_a_signed_file_holds_a_manifest_that_validates(tmp_path, x509, kind):
    path = tmp_path / "clip.mp4"
    signer = Signer(*new_chain(x509, tmp_path, kind))
    write_clip(path, small_clip(), {"lockstep": "{}"}, Disclosure(COMPOSITE, signer))
    told = manifest_of(path)
    manifest = told["manifests"][told["active_manifest"]]
    (action,) = next(
        a["data"]["actions"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")
    )
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", IPTC + COMPOSITE)
    assert manifest["title"] == "clip.mp4"
    assert manifest["signature_info"]["issuer"] == "test"
    # of a chain that nobody vouches for, nothing else may be wrong
    failures = {status["code"] for status in told.get("validation_status", [])}
    assert failures <= {"signingCredential.untrusted"}
    # the rest of the file is as it was
    assert source_type_of(path) == IPTC + COMPOSITE
    clip = read_clip(path)
    assert (len(clip.frames), clip.waveform.shape) == (6, (1, 8000))
    assert [entry.name for entry in tmp_path.glob(".*")] == []


def test_a_changed_file_no_longer_validates(tmp_path, chain):
    path = tmp_path / "clip.mp4"
    write_clip(path, small_clip(), None, Disclosure(MADE, Signer(*chain)))
    data = bytearray(path.read_bytes())
    data[data.index(b"mdat") + 100] ^= 1
    path.write_bytes(data)
    codes = {status["code"] for status in manifest_of(path)["validation_status"]}
    assert "assertion.bmffHash.mismatch" in codes


def test_the_environment_configures_it(chain, monkeypatch):
    monkeypatch.setenv(provenance.CERTIFICATE_VARIABLE, str(chain[0]))
    with pytest.raises(
        ProvenanceError, match=f"set {provenance.KEY_VARIABLE}, or .*--certificate and --private-key"
    ):
        find_signer()
    monkeypatch.setenv(provenance.KEY_VARIABLE, str(chain[1]))
    find_signer()


def test_the_command_signs(command, chain, tmp_path):
    code, told, _ = command("--certificate", chain[0], "--private-key", chain[1])
    assert (code, told["content_credentials"]) == (0, "signed")
    assert manifest_of(tmp_path / "clip.mp4")["active_manifest"]


def test_the_command_refuses_certificates_that_it_was_given_and_misses_those_of_the_environment(
    command, tmp_path, monkeypatch
):
    absent = tmp_path / "absent.pem"
    code, _, err = command("--certificate", absent, "--private-key", absent)
    assert code == 2
    assert f"cannot read {absent}" in err
    assert command("--certificate", absent, "--disclosure", "none")[0] == 2
    assert not (tmp_path / "clip.mp4").exists()
    monkeypatch.setenv(provenance.CERTIFICATE_VARIABLE, str(absent))
    code, told, err = command()
    assert code == 0
    assert f"set {provenance.KEY_VARIABLE}" in told["content_credentials"]
    assert "warning: not signed" in err


def test_a_key_of_another_certificate_is_told_before_any_clip_is_made(tmp_path, x509, chain):
    _, other = new_chain(x509, tmp_path, "SECP256R1")
    with pytest.raises(ProvenanceError, match="Content Credentials cannot be signed"):
        Signer(chain[0], other)


def test_without_the_package_its_absence_is_said(tmp_path, monkeypatch):
    files = tmp_path / "chain.pem", tmp_path / "key.pem"
    files[0].write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    files[1].write_text(
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n-----END PRIVATE KEY-----\n"
    )

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(provenance.importlib, "import_module", absent)
    with pytest.raises(ProvenanceError, match="pip install c2pa-python"):
        Signer(*files)


@pytest.mark.parametrize(
    ("certificate", "key", "sentence"),
    [
        (None, b"", "cannot read .*chain.pem: No such file"),
        (b"\x00\xff not a certificate", b"", "chain.pem holds no certificate in PEM form"),
        (b"-----BEGIN CERTIFICATE-----", b"words", "key.pem holds no private key in PEM form"),
        (
            b"-----BEGIN CERTIFICATE-----",
            b"-----BEGIN PRIVATE KEY-----\n!!\n-----END",
            "is no key that C2PA can sign with",
        ),
        (
            b"-----BEGIN CERTIFICATE-----",
            b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA",
            "use an unencrypted",
        ),
    ],
)
def test_files_that_are_no_certificate_are_refused(tmp_path, certificate, key, sentence):
    chain, secret = tmp_path / "chain.pem", tmp_path / "key.pem"
    if certificate is not None:
        chain.write_bytes(certificate)
    secret.write_bytes(key)
    with pytest.raises(ProvenanceError, match=sentence):
        Signer(chain, secret)


def test_a_disk_that_fills_up_while_signing_keeps_the_old_file(tmp_path, chain, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_clip(path, small_clip())
    before, signer = path.read_bytes(), Signer(*chain)

    class Full(io.BytesIO):
        def write(self, _data):
            raise OSError(28, "No space left on device")

    honest = signer.sign
    monkeypatch.setattr(signer, "sign", lambda source, _target, *rest: honest(source, Full(), *rest))
    with pytest.raises((MediaError, ProvenanceError)):
        write_clip(path, small_clip(), None, Disclosure(MADE, signer))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["clip.mp4"]
