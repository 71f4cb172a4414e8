"""Each record of docs/results/records is whole, and the pages list all of them."""

import csv
import itertools
import re
import runpy
import shlex

import pytest
import tyro

from benchmarks import records

RECORDS = records.records()
BY_NAME = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
_SENTENCE_END = re.compile(r"[.?](?=\s+[A-Z`]|$)")
_COMMAND = re.compile(r"^(?:\w+=\w+ )?python -m ((?:benchmarks|experiments)\S*) ?(.*)")


def test_the_pages_list_the_records_as_they_are():
    assert records.old_pages() == []
    sections = {name for names in records.PAGES.values() for name in names}
    assert {record.section for record in RECORDS} == sections


@BY_NAME
def test_a_record_asks_and_answers_in_a_few_sentences(record):
    assert record.question.endswith("?")
    text = " ".join(record.verdict.split())
    assert 1 <= len(_SENTENCE_END.findall(text)) <= 3
    assert text.endswith(".")
    assert "](" not in text  # it stands on two pages
    assert record.commands


@BY_NAME
def test_each_file_of_a_record_is_there(record):
    for table in record.tables:
        with (records.FOLDER / table.file).open(newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    for name in record.runs:
        assert (records.FOLDER.parent / name).exists()


def arguments_by_module():
    """Module to the arguments of each of its commands, as the shell passes them."""
    modules = {}
    for record in RECORDS:
        for module, text in filter(None, map(_parts, record.commands)):
            words = itertools.chain.from_iterable(map(braces, shlex.split(text)))
            modules.setdefault(module, []).append([*words])
    return modules


def _parts(command):
    match = _COMMAND.match(command)
    return match and match.groups()


def braces(word):
    """a{b,c} as the shell expands it: ab, ac."""
    parts = [part.split(",") for part in re.split(r"[{}]", word)]
    return map("".join, itertools.product(*parts))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", arguments_by_module())
def test_the_command_of_a_record_has_the_flags_that_it_names(module, monkeypatch):
    class Parsed(Exception):
        pass

    parse = tyro.cli

    def parse_alone(config, **options):
        parse(config, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_alone)
    for arguments in arguments_by_module()[module]:
        monkeypatch.setattr("sys.argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__")
        except Parsed:
            continue
        except ImportError as error:
            pytest.skip(str(error))
        pytest.fail(f"{module} reads no arguments")


def test_each_table_belongs_to_one_record():
    files = [table.file for record in RECORDS for table in record.tables]
    assert sorted(files) == sorted(path.name for path in records.FOLDER.glob("*.csv"))


def test_a_page_has_its_tables_as_they_stand_in_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    (tmp_path / "bits.csv").write_text('removed,"a, b"\n50 %,1|2\n')
    (tmp_path / "bits.toml").write_text(
        'title = "Bits"\nsection = "S"\nplace = 1\nquestion = "Why?"\n'
        'verdict = "No."\n[[tables]]\nfile = "bits.csv"\ncaption = "Loss"\n'
    )
    page = records.page(records.read(tmp_path / "bits.toml"))
    assert "| removed | a, b |\n| --- | --- |\n| 50 % | 1\\|2 |\n" in page
    with pytest.raises(ValueError, match="needs the lines"):
        records.with_index("no marks", "docs/results.md")
