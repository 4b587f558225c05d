"""Every table of the two READMEs shows numbers that stand in experiments/results/."""
import json
import re
from pathlib import Path

import ssl_loss
from experiments import RESULTS, SHOWN, memory

HERE = Path(__file__).parent

def rows_of(*names):
    """{row: the cells that a table may print, as text without spaces}, of these files together. A
    table may join rows that are called alike after ": "."""
    rows = {}
    for name in names:
        for title, row in json.loads((RESULTS / f"{name}.json").read_text())["rows"].items():
            seconds = row.get("seconds", [])
            assert len(set(seconds)) == len(seconds), f"{name}, {title}: a seed stands there twice"
            cells = rows.setdefault(title.split(": ")[-1].replace(" of 16", ""), set())
            for column, value in row.items():
                for known in (ssl_loss.COLUMNS, SHOWN, memory.COLUMNS, {column: (column, 1, 1)}):
                    if column in known:
                        cells.add(ssl_loss.cell(value, *known[column][1:]).replace(" ", ""))
    return rows

def tables(text):
    """Of every block of code whose commands name files with --save: these names, and of each line
    of the table below them its row and cells."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        lines = [(line.split("  ")[0], re.findall(r"(?<=  )\d[\d.]*(?: ±[\d.]+)?(?=  |$)", line))
                 for line in block.splitlines()]
        if names := re.findall(r"--save ([\w-]+)", block):
            yield names, [(row, [cell.replace(" ", "") for cell in cells])
                          for row, cells in lines if cells]

def test_a_line_shows_cells_of_its_row_in_the_files_that_its_block_names():
    found = list(tables((HERE / "README.md").read_text()))
    assert len(found) >= 8 and sum(len(lines) for _, lines in found) >= 50
    for names, lines in found:
        rows = rows_of(*names)
        for row, cells in lines:
            assert rows.get(row, set()).issuperset(cells), f"{names} have no {row}: {cells}"

def test_the_first_readmes_table_is_in_the_results():
    known = set().union(*rows_of("digits-192", "digits-192-controls").values())
    lines = [line for line in (HERE.parent / "README.md").read_text().splitlines()
             if line.startswith("|") and "±" in line]
    assert len(lines) >= 5
    for line in lines:
        cells = [re.sub(r"[ *]", "", cell) for cell in line.split("|")[2:-1]]
        assert [cell for cell in cells if cell not in known] == []

def test_a_number_of_another_row_is_found():
    rows = rows_of("memory")
    assert rows["end-to-end"].issuperset(["2479", "394", "1185"])
    assert not rows["FLL"] & {"2479", "394", "1185"}
