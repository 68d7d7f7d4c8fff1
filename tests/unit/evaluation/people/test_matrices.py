"""Files with human data, and which image each of their rows belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.people.analysis import HumanSide, Question, check_order
from evaluation.people.human import HumanMatrix, read_coordinates, read_order, read_similarities
from evaluation.people.matching import groups_of, match_rows
from tests.conftest import SHARED_DATA

HUMAN = SHARED_DATA / "rocks" / "human"
ROCKS = ["I_Basalt", "I_Andesite", "M_Gneiss", "S_Bituminous Coal"]


def write(folder: Path, text: str, name: str = "human.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "1 2\n3 4.5\n5 -6e-1\n7 8\n",
        "\nThis file holds the solution.\nRows 1-4 correspond to rocks.\n\n  1 2\n  3 4.5\n  5 -.6\n  7 8\n",
        "# comment\nx,y\n1,2\n3,4.5\n# between\n5,-0.6\n7,8,\n",
        "\ufeffx;y\r\n1;2\r\n3;4.5\r\n5;-0.6\r\n7;8\r\n",
        "1\t1\t2\n2\t3\t4.5\n3\t5\t-0.6\n4\t7\t8\n",  # numbered rows
    ],
)
def test_plain_text_in_many_forms(tmp_path: Path, text: str) -> None:
    people = read_coordinates(write(tmp_path, text))
    assert people.values.tolist() == [[1, 2], [3, 4.5], [5, -0.6], [7, 8]]
    assert people.names is None


@pytest.mark.parametrize(
    "text",
    [
        "Bituminous Coal 1 2\nBasalt 3 4\nGneiss 5 6\nChert 7 9\n",
        'name,x,y\n"Bituminous Coal",1,2\nBasalt,3,4\nGneiss,5,6\nChert,7,9\n',
    ],
)
def test_names_of_rows_are_kept(tmp_path: Path, text: str) -> None:
    people = read_coordinates(write(tmp_path, text))
    assert people.names == ("Bituminous Coal", "Basalt", "Gneiss", "Chert")
    assert people.values.shape == (4, 2)


def test_npy_is_read_and_pickles_are_not(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(6, 2) ** 2)
    assert read_coordinates(tmp_path / "a.npy").values.shape == (6, 2)
    np.save(tmp_path / "b.npy", np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no NPY file of plain numbers"):
        read_coordinates(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros(7))
    with pytest.raises(ValueError, match="shape \\(7,\\)"):
        read_coordinates(tmp_path / "c.npy")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no numbers here\n", "no row of numbers"),
        ("1 2\n3 4\noops\n5 6\n", "line 3: expected 2 numbers .* found 'oops'"),
        ("1 2\n3 4 5\n", "line 2: expected 2 numbers"),
        ("a 1 2\n3 4\n", "line 2: some rows begin with a name"),
        ("1 2\n3 nan\n5 6\n7 8\n", "row 2 holds a value that is no finite number"),
        ("1 2\n3 4\n", "2 rows: a space of fewer than 4"),
        ("1 2\n3 2\n5 2\n8 2\n", "dimension 2 is the same for all rows"),
        (" ".join(map(str, range(1, 1100))) + "\n", "at most 1,024 dimensions"),
    ],
)
def test_a_damaged_matrix_gives_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_coordinates(write(tmp_path, text))


def similarity_text(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(f"{value:.3f}" for value in row) for row in matrix) + "\n"


def test_similarities_lose_their_numbers_and_distances_turn_their_sign(tmp_path: Path) -> None:
    matrix = 9.0 - np.abs(np.subtract.outer(np.arange(5.0), np.arange(5.0)) ** 2) / 2
    numbered = np.column_stack([np.arange(1, 6), matrix])
    people = read_similarities(write(tmp_path, similarity_text(numbered)))
    assert people.values.tolist() == matrix.tolist()
    assert "numbers the rows" in people.notes[0]
    distances = read_similarities(write(tmp_path, similarity_text(9 - matrix)), are_distances=True)
    assert distances.values.tolist() == (matrix - 9).tolist()
    with pytest.raises(ValueError, match="give it with --distances"):
        read_similarities(write(tmp_path, similarity_text(9 - matrix)))
    with pytest.raises(ValueError, match="give it with --similarities"):
        read_similarities(write(tmp_path, similarity_text(matrix)), are_distances=True)


def test_similarities_of_unequal_halves_are_averaged_and_say_so(tmp_path: Path) -> None:
    matrix = np.arange(16.0).reshape(4, 4) + 20 * np.eye(4)
    people = read_similarities(write(tmp_path, similarity_text(matrix)))
    assert people.values[0, 1] == people.values[1, 0] == 2.5
    assert any("not symmetric" in note for note in people.notes)


def test_similarities_must_be_square_and_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 rows and 3 columns"):
        read_similarities(write(tmp_path, similarity_text(np.random.default_rng(0).random((5, 3)))))
    matrix = np.ones((4, 4)) + np.eye(4)
    matrix[0, 2] = np.nan
    with pytest.raises(ValueError, match="gaps"):
        read_similarities(write(tmp_path, similarity_text(matrix)))


def people_of(num_rows: int, names: tuple[str, ...] | None = None) -> HumanMatrix:
    values = np.random.default_rng(0).normal(size=(num_rows, 2))
    return HumanMatrix(values, names, Path("human.txt"))


def rock_keys() -> list[str]:
    """Keys as the rocks have them, stored in a random order: 4 classes × 3 tokens."""
    keys = [f"360 Rocks/{name}_{token:02d}.jpg" for name in ROCKS for token in (1, 2, 3)]
    return [keys[place] for place in np.random.default_rng(3).permutation(12)]


def test_rows_of_samples_follow_the_sorted_keys_whatever_the_stored_order() -> None:
    keys = rock_keys()
    matching = match_rows(people_of(12), keys, sorted(ROCKS), split="train")
    assert matching.kind == "samples"
    assert [keys[sample_id] for sample_id in matching.targets] == sorted(keys)
    # Igneous, metamorphic, sedimentary; then by name; then by token.
    assert matching.names[0].endswith("I_Andesite_01.jpg") and matching.names[3].endswith("I_Basalt_01.jpg")
    assert matching.names[-1].endswith("S_Bituminous Coal_03.jpg")
    assert "all 12 train images" in matching.rule and "I_Andesite_01" in matching.rule


def test_rows_can_be_named_in_a_list_and_be_some_of_the_samples(tmp_path: Path) -> None:
    keys = rock_keys()
    order = read_order(
        write(tmp_path, "# order\nM_Gneiss_02.jpg\nI_Basalt_03\n\nI_Basalt_01.jpg\nM_Gneiss_01\n")
    )
    matching = match_rows(
        people_of(4), keys, sorted(ROCKS), split="train", rows="samples", sample_order=order
    )
    assert [keys[t].split("/")[1] for t in matching.targets] == [
        "M_Gneiss_02.jpg", "I_Basalt_03.jpg", "I_Basalt_01.jpg", "M_Gneiss_01.jpg"
    ]  # fmt: skip
    assert "4 of 12 train images" in matching.rule


def test_rows_of_classes_are_matched_by_their_names_in_the_file() -> None:
    names = ("s bituminous coal", "I Basalt", "M_GNEISS", "I_Andesite")
    matching = match_rows(people_of(4, names), rock_keys(), sorted(ROCKS), split="val")
    assert matching.kind == "classes"
    assert matching.names == ("S_Bituminous Coal", "I_Basalt", "M_Gneiss", "I_Andesite")


def test_rows_that_fit_nothing_are_refused_with_what_was_found() -> None:
    keys, classes = rock_keys(), sorted(ROCKS)
    with pytest.raises(
        ValueError, match=r"split val has 12 images .* 4 classes, so it fits neither; split train"
    ):
        match_rows(people_of(30), keys, classes, split="val", other_counts={"train": 30})
    with pytest.raises(ValueError, match="fits neither: name the rows' images or classes"):
        match_rows(people_of(30), keys, classes, split="val")
    with pytest.raises(ValueError, match="'I_Basal' is none of the classes; the nearest is 'i basalt'"):
        match_rows(people_of(4), keys, classes, split="val", class_order=["I_Basal", *classes[1:]])
    with pytest.raises(ValueError, match="'I_Basalt' is there twice"):
        match_rows(people_of(4), keys, classes, split="val", class_order=["I_Basalt"] * 4)
    with pytest.raises(ValueError, match="the list of their order has 3 names"):
        match_rows(people_of(4), keys, classes, split="val", class_order=classes[:3])
    with pytest.raises(ValueError, match="say with --rows"):
        match_rows(people_of(4), keys[:4], classes, split="val")


def test_groups_are_what_stands_before_the_underscore_where_all_names_have_it() -> None:
    names = [f"{group}_{number}" for group in "IMS" for number in range(4)]
    assert groups_of(names) == {"I": [0, 1, 2, 3], "M": [4, 5, 6, 7], "S": [8, 9, 10, 11]}
    assert groups_of([*names, "granite"]) == {}
    assert groups_of(["polar_bear", "polar_fox", "brown_bear", "brown_fox"]) == {}
    assert groups_of(["class_0", "class_1", "class_2", "class_3"]) == {}


def question_of(order: np.ndarray) -> Question:
    """A space of 6 classes with 5 samples each, its rows in this order."""
    labels = np.repeat(np.arange(6), 5)
    generator = np.random.default_rng(0)
    values = (generator.normal(size=(6, 3))[labels] + 0.3 * generator.normal(size=(30, 3)))[order]
    keys = [f"{name}/{number}" for name in "abcdef" for number in range(5)]
    matching = match_rows(HumanMatrix(values, None, Path("x")), keys, list("abcdef"), split="val")
    return Question(HumanSide(values, matching), None, labels, tuple("abcdef"))


def test_a_wrong_order_of_rows_is_noticed() -> None:
    (right,) = check_order(question_of(np.arange(30)))
    assert right.fault is None
    (wrong,) = check_order(question_of(np.random.default_rng(1).permutation(30)))
    assert wrong.fault is not None and "order of the rows is probably wrong" in wrong.fault


@pytest.mark.skipif(not HUMAN.is_dir(), reason=f"{HUMAN} is not there")
def test_the_matrices_of_the_rocks_are_read_and_their_order_holds() -> None:
    space = read_coordinates(HUMAN / "mds_360.txt")
    judged = read_similarities(HUMAN / "similarity_ratings_360_collapsed_30x30.txt")
    assert space.values.shape == (360, 8) and judged.values.shape == (30, 30)
    assert space.values[0, 0] == -3.743 and judged.values[0, 1] == 4.90
    assert read_coordinates(HUMAN / "mds_30_categories.txt").values.shape == (30, 8)
    keys = sorted(f"360 Rocks/{path.name}" for path in (HUMAN.parent / "360 Rocks").iterdir())
    classes = sorted({Path(key).name.rsplit("_", 1)[0] for key in keys})
    labels = np.array([classes.index(Path(key).name.rsplit("_", 1)[0]) for key in keys])
    sides = [
        HumanSide(people.values, match_rows(people, keys, classes, split="train"))
        for people in (space, judged)
    ]
    checks = check_order(Question(sides[0], sides[1], labels, tuple(classes)))
    assert len(checks) == 2 and all(check.fault is None for check in checks)
    assert "ρ = 0.89" in checks[1].sentence
    assert {name: len(rows) for name, rows in groups_of(classes).items()} == {"I": 10, "M": 10, "S": 10}


def test_similarities_given_as_distances_are_refused_although_a_pair_is_likelier_than_its_own_class(tmp_path):
    matrix = np.full((6, 6), 2.0)
    matrix[0, 1] = matrix[1, 0] = 8.0  # two classes that people confuse
    np.fill_diagonal(matrix, 6.0)
    with pytest.raises(ValueError, match="--similarities"):
        read_similarities(write(tmp_path, similarity_text(matrix)), are_distances=True)
