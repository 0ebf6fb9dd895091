"""Every form of a pair table, roles, IJB's files; what they name is found or told with a count."""

from pathlib import Path

import numpy as np
import pytest
from tars import picture, write_tar

from data.errors import DataError
from data.index import load_index
from trainer.evaluate.ijb_tables import load_protocol
from trainer.evaluate.lookup import find_samples
from trainer.evaluate.tables import load_pairs, load_roles, spellings

PICTURE = picture(0)


@pytest.fixture
def index(tmp_path):
    """Ten people of three images, in two shards, as LFW has them: NAME/NAME_0001."""
    names = [f"P{who}/P{who}_{n:04d}" for who in range(10) for n in range(1, 4)]
    for shard in range(2):
        samples = {name: {"jpg": PICTURE, "cls": int(name[1])} for name in names[shard * 15 :][:15]}
        write_tar(tmp_path / f"s-{shard}.tar", samples)
    return load_index(str(tmp_path / "s-{0..1}.tar"), caption_key="")


def sample(who: int, number: int) -> int:
    return who * 3 + number - 1


WANTED = [((who, 1), (who, 2), True) for who in range(5)]
WANTED += [((who, 3), (9 - who, 1), False) for who in range(5, 10)]
KEYS = [(f"P{a}/P{a}_{n:04d}", f"P{b}/P{b}_{m:04d}", same) for (a, n), (b, m), same in WANTED]


def table(form: str) -> str:
    lines = []
    for (first, second, same), ((a, n), (b, m), _) in zip(KEYS, WANTED, strict=True):
        one, two = (key.rpartition("/")[2] for key in (first, second))
        lines.append(
            {
                "tsv": f"{first}\t{second}\t{same:d}",
                "csv": f"{first},{second},{str(same).lower()}",
                "spaces": f"{first} {second} {same:d}",
                "flag first": f"{2 * same - 1} {first}.jpg {second}.jpg",
                "last parts": f"x/y/{one} {two} {same:d}",
                "shard": f"s-{a > 4:d}.tar:{first} s-{b > 4:d}.tar:{second} {same:d}",
                "lfw": f"P{a}\t{n}\t{m}" if same else f"P{a}\t{n}\tP{b}\t{m}",
            }[form]
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("form", "head"),
    [
        ("tsv", "key_a\tkey_b\tsame\n"),
        ("tsv", "a\tb\tissame\n"),
        ("tsv", ""),
        ("tsv", "\ufeff\n"),
        ("csv", "image1,image2,Label\n"),
        ("csv", ""),
        ("spaces", ""),
        ("flag first", ""),
        ("last parts", ""),
        ("shard", ""),
        ("lfw", "10\t300\n"),
        ("lfw", "500\n"),
        ("lfw", ""),
    ],
)
def test_every_form_of_a_pair_table(tmp_path, index, form, head):
    (tmp_path / "pairs").write_text(head + table(form), encoding="utf-8")
    pairs = load_pairs(str(tmp_path / "pairs"), index)
    expected = [[sample(a, n), sample(b, m)] for (a, n), (b, m), _ in WANTED]
    assert pairs.samples.tolist() == expected and pairs.samples.dtype == np.int64
    assert pairs.same.tolist() == [same for *_, same in WANTED]


def test_the_flag_may_stand_between_other_columns(tmp_path, index):
    rows = [f"{a}\t{same:d}\t{b}\tfold" for a, b, same in KEYS]
    (tmp_path / "pairs").write_text("\n".join(["x\tmatch\ty\tfold", *rows]))
    pairs = load_pairs(str(tmp_path / "pairs"), index)
    assert pairs.samples[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the table is empty"),
        ("a b\n", "line 1: 'a b' is neither a pair"),
        ("a b maybe\n", "line 1: 'a b maybe' is neither a pair"),
        ("a b 1\n\na b\n", "line 3: has 2 columns where the first line has 3"),
        ("a b 1\na b 2\n", "line 2: '2' does not say whether the pair is the same"),
        ("P1 1 2\nP1 1 P2 1\nP1 one 2\n", "line 3: 'P1 one 2' is neither NAME N M nor"),
        (table("tsv").replace("P3/P3_0001", "Q/Q_1"), "1 of the 15 samples it names are in none"),
        ("".join(f"k{i} m{i} {i % 2}\n" for i in range(20)), "40 of the 40 samples"),
        ("\n".join(table("tsv").splitlines()[:7]), "5 pairs of one identity and 2 of two"),
        ("\n".join(table("tsv").splitlines()[:5] * 3), "15 pairs of one identity and 0 of two"),
    ],
)
def test_a_table_that_does_not_fit_is_one_clear_line(tmp_path, index, text, named):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(DataError, match=named) as error:
        load_pairs(str(tmp_path / "pairs.tsv"), index)
    assert str(tmp_path / "pairs.tsv") in str(error.value) and "\n" not in str(error.value)


def test_missing_samples_are_counted_with_an_example_and_what_keys_look_like(index):
    with pytest.raises(DataError) as error:
        find_samples([("P1/P1_0001",), ("nobody_2",), ("nobody_1",), ("nobody_1",)], index, "t.tsv")
    assert "t.tsv: 2 of the 3 samples it names are in none of the 2 shards" in str(error.value)
    assert "e.g. 'nobody_1'; keys there look like 'P0/P0_0001'" in str(error.value)


def test_a_key_that_comes_twice_must_name_its_shard(tmp_path):
    for shard in "ab":
        write_tar(
            tmp_path / f"{shard}.tar", {"k": {"jpg": PICTURE}, f"only_{shard}": {"jpg": PICTURE}}
        )
    index = load_index([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], caption_key="")
    found = find_samples([("b.tar:k",), ("a.tar:k",), ("only_b",)], index, "t")
    assert found.tolist() == [2, 0, 3]
    with pytest.raises(DataError, match=r"t: 'k' may be a\.tar:k or b\.tar:k: write it as"):
        find_samples([("k",)], index, "t")
    with pytest.raises(DataError, match="1 of the 1 samples it names are in none"):
        find_samples([spellings("a.tar:only_b.jpg")], index, "t")


def test_spellings():
    assert spellings("0892_0001") == ("0892_0001",)
    assert spellings("x/a.jpg") == ("x/a.jpg", "x/a")
    assert spellings("s.tar:key") == ("s.tar:key",)
    assert spellings("s.tar:x/key.png") == ("s.tar:x/key.png", "s.tar:x/key")
    assert spellings(".hidden") == (".hidden",)


def test_a_table_without_a_file(index):
    with pytest.raises(DataError, match=r"nowhere\.tsv: cannot be read as a table"):
        load_pairs("nowhere.tsv", index)


# ---------------------------------------------------------------- roles


def role_lines(identity: bool) -> list[str]:
    lines = []
    for who in range(6):
        for number in range(1, 4):
            role = "gallery" if number < 2 and who < 4 else "probe"
            name = f"\tperson {who // 2}" if identity else ""
            lines.append(f"P{who}_{number:04d}\t{role}{name}")
    return lines


@pytest.mark.parametrize("head", ["key\trole", ""])
def test_roles_by_label(tmp_path, index, head):
    (tmp_path / "g.tsv").write_text("\n".join([head, *role_lines(False)]))
    roles = load_roles(str(tmp_path / "g.tsv"), index)
    assert roles.gallery.tolist() == [sample(who, 1) for who in range(4)]
    assert roles.gallery_identities.tolist() == [0, 1, 2, 3]
    probes = [sample(w, n) for w in range(6) for n in (1, 2, 3) if not (w < 4 and n == 1)]
    assert roles.probes.tolist() == probes
    assert roles.probe_identities.tolist() == [probe // 3 for probe in probes]


@pytest.mark.parametrize("head", ["key\trole\tidentity", ""])
def test_roles_by_name(tmp_path, index, head):
    (tmp_path / "g.tsv").write_text("\n".join([head, *role_lines(True)[::-1]]))
    roles = load_roles(str(tmp_path / "g.tsv"), index)
    assert sorted(roles.gallery_identities.tolist()) == [0, 0, 1, 1]
    assert np.diff(roles.probes).min() > 0
    assert roles.probe_identities.tolist() == [probe // 6 for probe in roles.probes.tolist()]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("key\trole\nP1_0001\tboth\n", "line 2: the role is 'both', not gallery, probe"),
        ("who\trole\nP1_0001\tprobe\n", "has no column key"),
        ("key\trole\nP1_0001\n", "line 2: has 1 columns"),
        ("P1_0001\tprobe\nP1_0001\tgallery\n", "a sample has two lines"),
        ("P1_0001\tprobe\nP77\tgallery\n", "1 of the 2 samples it names"),
    ],
)
def test_roles_that_do_not_fit_are_one_clear_line(tmp_path, index, text, named):
    (tmp_path / "g.tsv").write_text(text)
    with pytest.raises(DataError, match=named):
        load_roles(str(tmp_path / "g.tsv"), index)


def test_roles_of_samples_without_a_label(tmp_path):
    write_tar(tmp_path / "x.tar", {"a": {"jpg": PICTURE, "cls": 1}, "b": {"jpg": PICTURE}})
    index = load_index(str(tmp_path / "x.tar"), caption_key="")
    (tmp_path / "g.tsv").write_text("a\tgallery\nb\tprobe\n")
    with pytest.raises(DataError, match="'b' has no label; add a column identity"):
        load_roles(str(tmp_path / "g.tsv"), index)


# ---------------------------------------------------------------- IJB


def write_ijb(folder: Path, *, prefix: str = "ijbc", **replaced: str) -> Path:
    """Files of ten images in six templates with the numbers 11, 22, ...; image 30 is in two."""
    images = [f"{n}.jpg" for n in range(21, 31)]
    members = [(name, 11 * (i // 2 + 1), 500 + i % 3) for i, name in enumerate(images)]
    members.append(("30.jpg", 66, 7))
    files = {
        "face_tid_mid": "".join(f"{n} {t} {m}\n" for n, t, m in members),
        "template_pair_label": "".join(
            f"{a} {b} {int((a + b) % 2)}\n" for a in (11, 22, 33) for b in (44, 55, 66)
        ),
        "name_5pts_score": "".join(
            f"{name} {' '.join(['1.5'] * 10)} 0.{i}5\n" for i, name in enumerate(images)
        ),
    }
    folder.mkdir()
    for name, text in (files | replaced).items():
        (folder / f"{prefix}_{name}.txt").write_text(text)
    return folder


@pytest.fixture
def ijb_index(tmp_path):
    samples = {str(n): {"jpg": PICTURE} for n in range(20, 31)}
    write_tar(tmp_path / "ijb.tar", samples)
    return load_index(str(tmp_path / "ijb.tar"), caption_key="")


def test_ijb_tables_as_published(tmp_path, ijb_index):
    protocol = load_protocol(str(write_ijb(tmp_path / "meta")), ijb_index, scores=True)
    assert protocol.members.num_templates == 6
    assert protocol.members.templates.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert protocol.members.samples.tolist() == [1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 10]
    assert protocol.members.media.tolist() == [500, 501, 500, 502, 501, 502, 500, 501, 500, 502, 7]
    assert protocol.pairs.tolist() == [[a, b] for a in (0, 1, 2) for b in (3, 4, 5)]
    assert protocol.same.tolist() == [bool((11 * (a + b + 2)) % 2) for a, b in protocol.pairs]
    assert protocol.scored.tolist() == list(range(1, 11))
    np.testing.assert_allclose(protocol.scores, np.arange(10) / 10 + 0.05, rtol=1e-6)
    plain = load_protocol(str(tmp_path / "meta" / "ijbc"), ijb_index, scores=False)
    assert len(plain.scores) == 0


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"template_pair_label": "11 22 1\n11 99 0\n"}, "line 2: 11 99 0 is no pair of templates"),
        ({"template_pair_label": "11 22 3\n"}, "line 1: 11 22 3 is no pair"),
        ({"template_pair_label": "11 22\n"}, "is not such a table"),
        ({"face_tid_mid": "21.jpg 11 x\n"}, "is not such a table"),
        ({"face_tid_mid": "99.jpg 11 1\n"}, "1 of the 1 samples it names"),
        ({"name_5pts_score": f"21.jpg {'1 ' * 10}0.5\n"}, "some images have no line in"),
    ],
)
def test_ijb_tables_that_do_not_fit(tmp_path, ijb_index, replaced, named):
    folder = write_ijb(tmp_path / "meta", **replaced)
    with pytest.raises(DataError, match=named):
        load_protocol(str(folder), ijb_index, scores=True)


def test_ijb_tables_must_be_one_set(tmp_path, ijb_index):
    folder = write_ijb(tmp_path / "meta")
    for kept in folder.iterdir():
        (folder / kept.name.replace("ijbc", "ijbb")).write_bytes(kept.read_bytes())
    with pytest.raises(DataError, match=r"ijbb_face_tid_mid\.txt, ijbc_face_tid_mid\.txt; name"):
        load_protocol(str(folder), ijb_index, scores=True)
    load_protocol(str(folder / "ijbb"), ijb_index, scores=True)
    with pytest.raises(DataError, match="there is none"):
        load_protocol(str(tmp_path / "nowhere"), ijb_index, scores=True)
