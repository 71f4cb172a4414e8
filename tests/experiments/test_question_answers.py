"""Pictures with questions from a folder or from TFDS: read late, refused early."""

import numpy as np
import pytest

from experiments.datasets import picture_questions
from experiments.phi3_vision import question_answers
from tests.support.picture_files import LINE, picture, write


def test_a_folder_is_read_line_by_line(tmp_path):
    array = picture(tmp_path)
    write(tmp_path, [LINE, "", {**LINE, "answer": "snow"}])
    write(tmp_path, [LINE], "validation")
    splits = question_answers.load(str(tmp_path))
    assert [x.answer for x in splits["train"]] == ["noise", "snow"]
    (one,) = splits["validation"]
    assert one.size == (6, 4)
    np.testing.assert_array_equal(np.asarray(one.image), array)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["{"], "line 1: not JSON"),
        ([LINE, {"image": "a.png", "question": "what ?"}], "line 2: must be an object"),
        (["[1]"], "line 1: must be an object"),
        ([{**LINE, "image": "train.jsonl"}], "line 1: no picture that can be read"),
        ([{**LINE, "answer": 3}], "line 1: must be an object"),
        ([""], "got none"),
    ],
)
def test_a_line_that_is_wrong_is_named(lines, sentence, tmp_path):
    picture(tmp_path)
    write(tmp_path, lines)
    with pytest.raises(ValueError, match=sentence):
        question_answers.load(str(tmp_path))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl' does not exist"):
        question_answers.load(str(tmp_path))
    write(tmp_path, [LINE])
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no .*a\.png"):
        question_answers.load(str(tmp_path))


def test_a_tfds_data_set_is_read_by_its_features(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_questions, "SIZES", {"train": 3, "validation": 2})
    splits = question_answers.load("picture_questions", data_dir=tmp_path)
    same = question_answers.load("tfds:picture_questions", data_dir=tmp_path)
    assert [x.answer for x in splits["train"]] == [x.answer for x in same["train"]]
    fields = ("image", "question", "answer")
    with pytest.raises(ValueError, match="lack image; give --fields"):
        question_answers.load(
            "tfds:picture_questions", data_dir=tmp_path, fields=fields
        )
