"""Every table of the two READMEs shows numbers that stand in experiments/results/."""
import json
import re
from pathlib import Path

import pytest

import ssl_loss

HERE = Path(__file__).parent
OWN = {"rounds": ("rounds", 1, 1), "top1": ("top-1 %", 1, 1), "top5": ("top-5 %", 1, 1)}

def cells_of_the_results():
    """Every cell that fllw.table() prints of a file, as text without spaces."""
    cells = set()
    for path in (HERE / "results").glob("*.json"):
        for row in json.loads(path.read_text())["rows"].values():
            for column, value in row.items():
                form = (ssl_loss.COLUMNS | OWN).get(column, (column, 1, 1))
                cells.add(ssl_loss.cell(value, *form[1:]).replace(" ", ""))
    return cells

def cells_with_a_spread(text):
    """Numbers with a deviation, as "94.2±0.4", of the lines of tables."""
    lines = [line for line in text.splitlines() if line.count("±") > 1 or line.startswith("|")]
    return [(found.replace(" ", "").replace("*", ""), line) for line in lines
            for found in re.findall(r"\d+\.\d+ ?± ?\d+\.\d+", line)]

@pytest.mark.parametrize("path", [HERE / "README.md", HERE.parent / "README.md"], ids=str)
def test_tables_show_numbers_that_are_in_the_results(path):
    known, shown = cells_of_the_results(), cells_with_a_spread(path.read_text())
    assert len(shown) >= 8
    assert [line for cell, line in shown if cell not in known] == []

def test_a_number_that_is_in_no_file_is_found():
    assert "94.2±0.4" in cells_of_the_results()
    assert cells_with_a_spread("a  FLL  94.2 ±0.4  1.2 ±0.3")[0][0] == "94.2±0.4"
    assert "94.2±9.9" not in cells_of_the_results()
