"""Every table of the two READMEs shows numbers that stand in experiments/results/."""
import json
import re
from pathlib import Path

import pytest

import ssl_loss

HERE = Path(__file__).parent
OWN = {"rounds": ("rounds", 1, 1), "top1": ("top-1 %", 1, 1), "top5": ("top-5 %", 1, 1)}

def rows_of(path):
    """Of every row of a file, the cells that fllw.table() prints, as text without spaces."""
    return [{ssl_loss.cell(value, *(ssl_loss.COLUMNS | OWN).get(column, (column, 1, 1))[1:])
             .replace(" ", "") for column, value in row.items()}
            for row in json.loads(path.read_text())["rows"].values()]

def cells_of_the_results():
    """Every cell of every file."""
    return {cell for path in (HERE / "results").glob("*.json") for row in rows_of(path)
            for cell in row}

def tables(text):
    """Of every block of code whose commands name files with --save: these names, and the cells of
    each line of the table below them."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        lines = [re.findall(r"(?<=  )\d[\d.]*(?: ±[\d.]+)?(?=  |$)", line)
                 for line in block.splitlines()]
        if names := re.findall(r"--save ([\w-]+)", block):
            yield names, [[c.replace(" ", "") for c in cells] for cells in lines if cells]

def cells_with_a_spread(text):
    """Numbers with a deviation, as "94.2±0.4", of the lines of tables."""
    lines = [line for line in text.splitlines() if line.count("±") > 1 or line.startswith("|")]
    return [(found.replace(" ", "").replace("*", ""), line) for line in lines
            for found in re.findall(r"\d+\.\d+ ?± ?\d+\.\d+", line)]

def test_the_cells_of_a_line_are_those_of_the_files_that_its_block_names():
    """A table that shows one file's row a line has the cells of one row; others join rows."""
    found = list(tables((HERE / "README.md").read_text()))
    assert len(found) >= 10 and sum(len(lines) for _, lines in found) >= 75
    for names, lines in found:
        rows = [row for name in names for row in rows_of(HERE / "results" / f"{name}.json")]
        joined = names[0].split("-")[0] in ("finetuned", "stragglers", "personal")
        rows = [set().union(*rows)] if joined else rows
        for cells in lines:
            assert any(row.issuperset(cells) for row in rows), f"{names} have no row of {cells}"

@pytest.mark.parametrize("path", [HERE / "README.md", HERE.parent / "README.md"], ids=str)
def test_tables_show_numbers_that_are_in_the_results(path):
    known, shown = cells_of_the_results(), cells_with_a_spread(path.read_text())
    assert len(shown) >= 8
    assert [line for cell, line in shown if cell not in known] == []

def test_a_number_that_is_in_no_file_is_found():
    assert "94.2±0.4" in cells_of_the_results()
    assert cells_with_a_spread("a  FLL  94.2 ±0.4  1.2 ±0.3")[0][0] == "94.2±0.4"
    assert "94.2±9.9" not in cells_of_the_results()
