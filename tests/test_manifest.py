"""The manifest: JSON with a checksum, checked field by field, all problems at once."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from forge import leaves, put
from hypothesis import given, settings
from hypothesis import strategies as st

import strapfmt.manifest
from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.errors import CorruptError, StrapfmtError, UnsupportedError
from strapfmt.manifest import Counts, Layout, Manifest, Part, Shard, SiteEntry, TableEntry, file_slug
from strapfmt.schema import SiteSpec

H = "0123456789abcdef" * 2


def part(role: str, file: str, **options: Any) -> Part:
    return Part(role=role, file=file, n_bytes=100, hash=H, **options)


def shard_of(number: int, first: int = 0, n_rows: int = 10, kind: str = "sites/x") -> Shard:
    stem = f"{kind}/{number:06d}"
    is_site = kind.startswith("sites")
    return Shard(
        n_rows=n_rows,
        first_row=first if is_site else None,
        last_row=first + n_rows - 1 if is_site else None,
        is_sealed=True,
        session=0,
        parts=(part("data", f"{stem}.arrow"), part("index", f"{stem}.idx")),
    )


def make_manifest(**options: Any) -> Manifest:
    site = SiteEntry(
        spec=SiteSpec(name="blocks.0.x", dtype="bfloat16", shape=(8,), module_path="model.layers.0"),
        layout=Layout(kind="rows", batch_rows=4),
        counts=Counts(expected=30, written=20, dropped=10),
        shards=(shard_of(0), shard_of(1, first=12)),
    )
    fields: dict[str, Any] = {
        "rank": 0,
        "writer_id": H,
        "commit": 3,
        "is_clean": False,
        "created_ns": 1,
        "committed_ns": 2,
        "counters": {"row": 22, "step": 2, "sequence": 1},
        "sessions": ({"model": "gpt2", "tags": {"a": [1, 2.5, None]}},),
        "sites": (site,),
        "tables": (TableEntry(name="tokens", shards=(shard_of(0, kind="tables/tokens"),)),),
    }
    return Manifest(**(fields | options))


def stored(document: Any) -> bytes:
    """Return a JSON document as a manifest with its checksum."""
    document = {key: value for key, value in document.items() if key != "hash"}
    body = json.dumps(document, separators=(",", ":")).encode()[:-1]
    return signed(body)


def signed(body: bytes) -> bytes:
    return body + b',"hash":"' + digest(body).hex().encode() + b'"}\n'


def document() -> Any:
    return json.loads(make_manifest().encode())


def test_a_manifest_comes_back() -> None:
    manifest = make_manifest()
    data = manifest.encode()
    assert Manifest.decode(data, "m") == manifest
    assert Manifest.decode(data, "m").encode() == data


def test_a_shard_is_encoded_once_for_all_manifests_that_list_it(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, encoded, fields_of = make_manifest(), list[object](), strapfmt.manifest._fields_of
    manifest.encode()
    monkeypatch.setattr(strapfmt.manifest, "_fields_of", lambda it: encoded.append(it) or fields_of(it))
    later = replace(manifest, commit=4)
    assert Manifest.decode(later.encode(), "m") == later
    assert not any(isinstance(record, Part) for record in encoded)


def test_the_checksum_ends_the_file_at_a_fixed_length() -> None:
    data = make_manifest().encode()
    body, suffix = data[: -spec.MANIFEST_HASH_SUFFIX_BYTES], data[-spec.MANIFEST_HASH_SUFFIX_BYTES :]
    assert suffix == b',"hash":"' + digest(body).hex().encode() + b'"}\n'
    assert json.loads(data)["hash"] == digest(body).hex()


def test_every_flipped_bit_is_refused() -> None:
    data = make_manifest(sites=(), tables=()).encode()
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(CorruptError):
                Manifest.decode(bytes(damaged), "m")


@pytest.mark.parametrize("size", [0, 1, 43, 44, 45, 200])
def test_a_cut_manifest_is_refused(size: int) -> None:
    with pytest.raises(CorruptError, match="m: "):
        Manifest.decode(make_manifest().encode()[:size], "m")


def test_all_problems_are_told_at_once_with_their_places() -> None:
    value = document()
    value["rank"] = -1
    value["sites"][0]["shards"][1]["n_rows"] = "ten"
    value["sites"][0]["layout"]["kind"] = "spiral"
    value["tables"][0]["shards"][0]["parts"][0]["file"] = "../../etc/passwd"
    with pytest.raises(CorruptError) as caught:
        Manifest.decode(stored(value), "m")
    text = "\n".join(caught.value.problems)
    for place in (
        "rank: expected int 0..4194303, got -1",
        "sites.0.shards.1.n_rows: expected int",
        "sites.0.layout.kind: expected one of rows, strided, plain; got 'spiral'",
        "tables.0.shards.0.parts.0.file",
    ):
        assert place.replace("; got", ", got") in text or place in text


@pytest.mark.parametrize(
    "file",
    [
        "../x/000000.arrow",
        "/etc/passwd",
        "sites/../000000.arrow",
        "sites/x/../000000.arrow",
        "sites/./000000.arrow",
        "sites//000000.arrow",
        "sites/x/y/000000.arrow",
        "sites/x/000000.arrow\n",
        "sites/x\0/000000.arrow",
        "sites/X/000000.arrow",
        "other/x/000000.arrow",
        "sites/x/00000.arrow",
        "sites/x/000000",
        "",
    ],
)
def test_a_path_that_leaves_its_place_is_refused(file: str) -> None:
    value = document()
    value["sites"][0]["shards"][0]["parts"][0]["file"] = file
    with pytest.raises(CorruptError, match=r"parts\.0\.file"):
        Manifest.decode(stored(value), "m")


@pytest.mark.parametrize(
    ("place", "lie"),
    [
        (("sites", 0, "shards", 1, "first_row"), 9),
        (("sites", 0, "shards", 1, "first_row"), 21),
        (("sites", 0, "shards", 0, "last_row"), 3),
        (("sites", 0, "shards", 0, "first_row"), 1 << 40),
        (("sites", 0, "shards", 0, "n_rows"), 0),
        (("sites", 0, "shards", 0, "parts"), []),
        (("sites", 0, "shards", 0, "parts", 1, "role"), "data"),
        (("sites", 0, "shards", 0, "is_sealed"), 1),
        (("sites", 0, "shape"), [0]),
        (("sites", 0, "shape"), [1 << 20, 1 << 20]),
        (("sites", 0, "shape"), [1] * 9),
        (("sites", 0, "shape"), [True]),
        (("sites", 0, "statistics"), ["l2_norm", "l2_norm"]),
        (("sites", 0, "row_space"), "both"),
        (("sites", 0, "name"), ""),
        (("sites", 0, "name"), "a\0b"),
        (("sites", 0, "name"), "\ud800"),
        (("sites", 0, "name"), "x" * 1025),
        (("counters", "row"), (1 << 40) + 1),
        (("writer_id",), H.upper()),
        (("format",), "parquet"),
        (("commit",), 1.0),
        (("sessions",), ["text"]),
        (("min_reader_version",), 0),
    ],
)
def test_a_lie_is_refused(place: tuple[str | int, ...], lie: Any) -> None:
    value = document()
    put(value, place, lie)
    with pytest.raises(CorruptError):
        Manifest.decode(stored(value), "m")


def test_every_field_is_needed() -> None:
    for place in leaves(document()):
        is_null = place[0] == "tables" and place[-1] in ("first_row", "last_row")
        if isinstance(place[-1], int) or place[0] in ("hash", "sessions") or is_null:
            continue
        value = document()
        put(value, place, ...)
        with pytest.raises((CorruptError, UnsupportedError)):
            pytest.fail(f"{place}: {Manifest.decode(stored(value), 'm')}")


@pytest.mark.parametrize(
    "body",
    [
        b'{"rank":0,"rank":1',
        b'{"a":NaN',
        b'{"a":-Infinity',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a":' + b"9" * 10_000,
        b'{"a":1e999',
        b'{"a":"\xff"',
        b'{"a":"unterminated',
        b"[1,2",
        b"",
        b"{" + b'"format":"strapfmt"',
    ],
)
def test_json_that_is_none_or_none_of_ours_is_refused(body: bytes) -> None:
    with pytest.raises(CorruptError):
        Manifest.decode(signed(body), "m")


def test_fields_of_later_versions_are_ignored() -> None:
    value = document()
    value["colour"] = "blue"
    value["sites"][0]["taste"] = [1]
    value["sites"][0]["shards"][0]["parts"][0]["origin"] = {}
    value["tables"].append({"name": "experts", "shards": []})
    assert Manifest.decode(stored(value), "m") == make_manifest()


@pytest.mark.parametrize(("field", "value"), [("min_reader_version", 2), ("required_features", ["planes"])])
def test_what_needs_a_newer_reader_says_so(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match="install a newer strapfmt"):
        Manifest.decode(stored(document() | {field: value}), "m")


def test_two_sites_of_one_name_are_refused() -> None:
    value = document()
    value["sites"].append(value["sites"][0])
    with pytest.raises(CorruptError, match="distinct names"):
        Manifest.decode(stored(value), "m")


@settings(deadline=None)
@given(st.text(min_size=1, max_size=80).filter(lambda text: "\0" not in text and text.isprintable()))
def test_a_slug_is_a_safe_file_name(name: str) -> None:
    slug = file_slug(name)
    assert re.fullmatch(r"[a-z0-9][a-z0-9._~-]{0,127}", slug)
    assert ".." not in (slug, slug[:2])
    assert not slug.endswith(".")
    file = f"sites/{slug}/000000.arrow"
    entry = replace(
        make_manifest().sites[0],
        shards=(replace(shard_of(0), parts=(part("data", file), *shard_of(0).parts[1:])),),
    )
    manifest = make_manifest(sites=(entry,))
    assert Manifest.decode(manifest.encode(), "m") == manifest


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30).filter(lambda t: t.isprintable()), unique=True, max_size=30))
def test_slugs_of_different_names_differ(names: list[str]) -> None:
    assert len({file_slug(name) for name in names}) == len(names)


def test_a_readable_name_is_its_own_slug() -> None:
    assert file_slug("blocks.12.resid_post") == "blocks.12.resid_post"
    assert file_slug("model.layers[0]/MLP").startswith("model.layers-0-mlp~")


def test_provenance_of_any_depth_that_can_be_written_can_be_read() -> None:
    for depth in (50, 200, 900):
        value: Any = 1
        for _ in range(depth):
            value = [value]
        try:
            data = make_manifest(sessions=({"deep": value},)).encode()
        except (RecursionError, StrapfmtError):
            continue
        assert Manifest.decode(data, "m").sessions[0]["deep"] == value
