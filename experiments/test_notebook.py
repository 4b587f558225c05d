"""The stored notebook: short cells, run in order; a sentence reads numbers that stand above it."""
import inspect
import json
import re
from pathlib import Path

import pytest

import data
import fllw
import ssl_loss
from experiments import exercises

PATH = Path(__file__).parents[1] / "demo.ipynb"
CELLS = json.loads(PATH.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]

def text_of(cell):
    """What the outputs of a cell show, without HTML's tags, so without pictures."""
    parts = [part for output in cell["outputs"] for part in (
        output["text"] if "text" in output else output["data"].get("text/html") or
        output["data"].get("text/markdown") or output["data"]["text/plain"])]
    return re.sub("<[^>]*>", "\n", "".join(parts))

def numbers_in(text):
    return set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))

def test_cells_are_short_and_ran_in_order():
    heading = next(i for i, cell in enumerate(CELLS) if "## Exercises" in "".join(cell["source"]))
    lengths = [sum(bool(line.strip()) for line in cell["source"]) for cell in CODE]
    before = sum(cell["cell_type"] == "code" for cell in CELLS[:heading])
    assert max(lengths) <= 20 and sum(lengths[:before]) <= 160
    assert [cell["execution_count"] for cell in CODE] == list(range(1, 1 + len(CODE)))
    assert PATH.stat().st_size < 2e6

def test_every_number_that_a_sentence_reads_is_in_the_output_above_it():
    above, read = "", 0
    for cell in CELLS:
        if cell["cell_type"] == "code":
            above = text_of(cell)
        for paragraph in "".join(cell["source"]).split("\n\n"):
            if cell["cell_type"] == "markdown" and paragraph.startswith("**Read:**"):
                assert numbers_in(paragraph) <= numbers_in(above), paragraph
                read += len(numbers_in(paragraph))
    assert read > 50

def test_outputs_have_alternative_texts_and_no_long_lines_and_code_builds_no_sentence():
    for cell in CODE:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            assert "image/png" not in output.get("data", {})  # its alternative text would be lost
            assert all(re.match('<img alt="[^"]{20,}', image) for image in re.findall(
                "<img[^>]*", "".join(output.get("data", {}).get("text/html", ""))))
            assert max(map(len, "".join(output.get("text", "")).splitlines()), default=0) <= 90
            if markdown := "".join(output.get("data", {}).get("text/markdown", "")):
                name = re.search(r"def (\w+)", markdown)[1]
                assert markdown == f"```python\n{inspect.getsource(getattr(fllw, name))}```"

@pytest.mark.parametrize("check, mine, words", [
    *((check, answer, ": right") for check, answer in exercises.ANSWERS.items()),
    *((check, lambda *_: None, "returns nothing yet") for check in exercises.ANSWERS),
    (exercises.check_nt_xent, lambda z1, z2, t: exercises.nt_xent(z1, z2, 1), "where is the temp"),
    (exercises.check_nt_xent, lambda z1, z2, t: ssl_loss.nt_xent(z1, z1, t), " is right"),
    (exercises.check_average, lambda sent, _: exercises.average(sent, [1, 1, 1]), "weight each"),
    (exercises.check_upload, lambda config: exercises.upload_bytes(config) // 4, "four bytes"),
    (exercises.check_plan, lambda config: fllw.stages(config)[:3], "the last round is 12, not 16"),
    (exercises.check_deepest, lambda config, cap: 2, "depth 2: 473 MiB"),
    (exercises.check_momentum, lambda beta: lambda state: None, "the last step is not repeated")])
def test_checkers_accept_the_answers_and_name_mistakes(check, mine, words, capsys):
    check(mine)
    assert words in capsys.readouterr().out

@pytest.fixture
def lesson():
    pytest.importorskip("matplotlib")
    pytest.importorskip("IPython")
    from experiments import lesson
    return lesson

def test_the_film_splits_what_a_round_costs_among_its_clients(lesson):
    config = fllw.Config(clients=5, clients_per_round=3, depth=6, rounds=20, depth_dropout=0.5)
    rows = [{"round": number, "stage": stage.number, "kept": kept, "losses": dict.fromkeys(kept, 0)}
            for stage in fllw.stages(config) for number in stage.rounds
            for kept in [{client: fllw.sample_kept_blocks(config, stage, number, client)
                          for client in fllw.sample_clients(config, number)}]]
    columns = iter(lesson.columns_of(config, (1, 28, 28), rows).values())
    for paid in fllw.replay(config, (1, 28, 28), rows):
        mean = sum(float(next(columns)["kB down"]) for _ in range(3)) / 3
        assert mean == pytest.approx(paid["download_bytes"] / 1e3, abs=0.1)

def test_votes_are_those_of_knn(lesson):
    dataset = data.load("mnist5k", images=200)
    right = lesson.is_right(None, dataset, dataset.test_images)
    accuracy = ssl_loss.knn(ssl_loss.pixels(dataset.train_images), dataset.train_labels,
                            ssl_loss.pixels(dataset.test_images), dataset.test_labels)
    assert 100 * right.double().mean().item() == pytest.approx(accuracy) and 50 < accuracy < 99
