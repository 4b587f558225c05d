"""Every table of the two READMEs shows numbers that stand in experiments/results/."""
import json
import re
from pathlib import Path

import numpy as np

import ssl_loss
from experiments import SHOWN

HERE = Path(__file__).parent
MEMORY = {name: (name, 2**20, 0) for name in ("1", "4", "16", "whole", "floor")}
MEMORY |= {"macs": ("GMAC", 1e9, 0), "micro_macs": ("in micro", 1e9, 0)}
OTHERS = {"rounds": ("rounds", 1, 1), "top1": ("top-1 %", 1, 1), "top5": ("top-5 %", 1, 1)}

def rows_of(path):
    """Of every row of a file, the cells that a table may print, as text without spaces."""
    rows = []
    for row in json.loads(path.read_text())["rows"].values():
        if "upload_bytes" in row:
            row["bytes"] = np.add(row["download_bytes"], row["upload_bytes"])
        cells = set()
        for column, value in row.items():
            for known in (ssl_loss.COLUMNS, SHOWN, MEMORY, OTHERS, {column: (column, 1, 1)}):
                if column in known:
                    cells.add(ssl_loss.cell(value, *known[column][1:]).replace(" ", ""))
        rows.append(cells)
    return rows

def tables(text):
    """Of every block of code whose commands name files with --save: these names, and the cells of
    each line of the table below them."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        lines = [re.findall(r"(?<=  )\d[\d.]*(?: ±[\d.]+)?(?=  |$)", line)
                 for line in block.splitlines()]
        if names := re.findall(r"--save ([\w-]+)", block):
            yield names, [[cell.replace(" ", "") for cell in cells] for cells in lines if cells]

def test_the_cells_of_a_line_are_those_of_the_files_that_its_block_names():
    """A table that shows one file's row a line has the cells of one row; others join rows."""
    found = list(tables((HERE / "README.md").read_text()))
    assert len(found) >= 8 and sum(len(lines) for _, lines in found) >= 50
    for names, lines in found:
        rows = [row for name in names for row in rows_of(HERE / "results" / f"{name}.json")]
        joined = names[0].split("-")[0] in ("finetuned", "stragglers", "personal", "many")
        rows = [set().union(*rows)] if joined else rows
        for cells in lines:
            assert any(row.issuperset(cells) for row in rows), f"{names} have no row of {cells}"

def test_the_first_readmes_table_is_in_the_results():
    known = set().union(*(row for path in (HERE / "results").glob("*.json")
                          for row in rows_of(path)))
    lines = [line for line in (HERE.parent / "README.md").read_text().splitlines()
             if line.startswith("|") and "±" in line]
    assert len(lines) >= 5
    for line in lines:
        cells = [re.sub(r"[ *]", "", cell) for cell in line.split("|")[2:-1]]
        assert [cell for cell in cells if cell not in known] == []

def test_a_number_that_is_in_no_file_is_found():
    rows = rows_of(HERE / "results" / "memory.json")
    assert any(row.issuperset(["2479", "394", "1185"]) for row in rows)
    assert not any(row.issuperset(["2479", "395"]) for row in rows)
