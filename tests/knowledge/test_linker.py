"""Names to entities: exact, by spelling, ambiguous, NIL; mentions in running text."""

import random
import sys

import numpy as np
import pytest
from tiny_corpus import write_tiny_corpus

from trelm_ds.errors import ConfigError
from trelm_ds.knowledge import linker as module
from trelm_ds.knowledge.linker import EntityLinker, edit_distance, name_vectors, normalize

ALIASES = [
    ("Paris", 0),
    ("City of Light", 0),
    ("Paris", 1),
    ("Paris, Texas", 1),
    ("Lyon", 2),
    ("Georgia", 3),
    ("Georgia", 4),
    ("Île-de-France", 5),
]
PRIOR = np.array([9, 2, 5, 4, 4, 1])


def slow_edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        following = [i]
        for j, y in enumerate(b, 1):
            following.append(min(following[-1] + 1, row[j] + 1, row[j - 1] + (x != y)))
        row = following
    return row[-1]


def test_edit_distance_equals_the_textbook_table():
    draw = random.Random(0)
    for _ in range(500):
        a, b = ("".join(draw.choices("abé", k=draw.randint(0, 80))) for _ in range(2))
        assert edit_distance(a, b) == slow_edit_distance(a, b), (a, b)


def test_names_compare_without_case_width_or_extra_blanks():
    assert normalize("  ＰＡＲＩＳ \t Nord ") == "paris nord" == normalize("Paris Nord")


def test_name_vectors_depend_on_the_name_alone():
    names = ["paris", "x", "a longer name with many letters", "paris"]
    together = name_vectors(names)
    assert together.shape == (4, 128)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    for row, name in zip(together, names, strict=True):
        np.testing.assert_array_equal(row, name_vectors([name])[0])


def test_exact_then_prior_then_nil():
    linker = EntityLinker(ALIASES, PRIOR)
    links = linker.link(["PARIS", "paris,  texas", "Georgia", "île-de-france", ""])
    assert [link and link.entity for link in links] == [0, 1, None, 5, None]
    assert all(link.distance == 0 for link in links if link)
    # Georgia's two entities have equal priors: undecidable, and never guessed by spelling.
    assert linker.counts == {"exact": 3, "nil": 2}


def test_spelling_is_the_second_choice_and_has_a_limit():
    linker = EntityLinker(ALIASES, PRIOR)
    near, far, ambiguous = linker.link(["Citty of Light", "Cite de la Lumiere", "Geogia"])
    assert near.entity == 0 and near.alias == "city of light"
    assert near.distance == pytest.approx(1 / 14)
    assert far is None
    assert ambiguous is None
    assert linker.counts == {"exact": 0, "approximate": 1, "nil": 2}


@pytest.mark.parametrize("flat_limit", [50_000, 100])
def test_one_typo_is_found_by_both_kinds_of_index(monkeypatch, flat_limit):
    monkeypatch.setattr(module, "_FLAT_LIMIT", flat_limit)
    draw = random.Random(1)
    syllables = ["ba", "co", "di", "fu", "ge", "lin", "mor", "nar", "pes", "tor", "vik", "zan"]
    names = sorted({"".join(draw.choices(syllables, k=5)).title() for _ in range(4000)})
    linker = EntityLinker([(name, i) for i, name in enumerate(names)], np.zeros(len(names)))
    wanted = draw.sample(range(len(names)), 200)
    typos = [names[i][:4] + names[i][5:] for i in wanted]
    links = linker.link(typos)
    right = sum(
        link is not None and link.entity == i for link, i in zip(links, wanted, strict=True)
    )
    # Deleting a letter can also make a second name as near: then NIL is right.
    assert right > 180


def test_mentions_in_text_are_the_longest_names():
    linker = EntityLinker(ALIASES, PRIOR)
    text = "From Paris, Texas to LYON in Île-de-France; paris is no city, 2024 no name."
    found = [(text[start:end], entity) for start, end, entity in linker.find(text)]
    assert found == [("Paris, Texas", 1), ("LYON", 2), ("Île-de-France", 5)]
    # A text without capitals cannot tell names by them.
    assert [e for _, _, e in linker.find("from paris to lyon")] == [0, 2]


def test_a_missing_faiss_is_one_clear_error_and_exact_links_still_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    linker = EntityLinker(ALIASES, PRIOR)
    assert linker.link(["Lyon"])[0].entity == 2
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        linker.link(["Lyonn"])


def test_a_prepared_folder_links_its_own_names(tmp_path):
    tiny = write_tiny_corpus(tmp_path)
    linker = EntityLinker.load(tmp_path)
    links = linker.link(tiny.entity_names)
    assert [link.entity for link in links] == list(range(len(tiny.entity_names)))
