"""docs/benchmarks.md: its blocks are those that the committed results give, and each is rewritten by itself."""

import re
import shutil
from pathlib import Path

import pytest
from canned import imagined_fused_gpu_run, imagined_gpu_run, rows_of

from benchmarks.__main__ import RESULTS, main
from benchmarks.document import DOCUMENT, NUMERICS, TUNING, TUNING_RANGE, markers, rewritten
from benchmarks.numerics_report import is_numerics, load_results, page
from benchmarks.report import block_name, blocks, compare, means
from benchmarks.rows import TOUCHED, InputError, load_rows, save_rows

FILES = sorted(RESULTS.glob("*.json"))
STUDIES = {TUNING: RESULTS / "tuning" / "results.json", TUNING_RANGE: RESULTS / "tuning" / "range" / "results.json"}
GPU = [*imagined_gpu_run(), *imagined_fused_gpu_run()]


@pytest.mark.parametrize("file", [*FILES, *STUDIES.values()], ids=lambda file: file.parent.name + file.stem)
def test_document_shows_the_committed_results(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ["tuning"] if file in STUDIES.values() else []
    command = [*study, "report", str(shutil.copy(file, tmp_path)), "--document", "--check"]
    assert main(command) == 0, capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing is drawn or written beside it"


def test_every_block_of_the_document_has_one_file() -> None:
    named = [{NUMERICS} if is_numerics(file) else set(map(block_name, load_rows(file))) for file in FILES]
    found = [*STUDIES, *(name for names in named for name in names)]
    blocks = re.findall("<!-- (.*):begin -->", DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(blocks) == sorted(found)


def test_every_row_of_the_accuracy_is_on_its_page() -> None:
    (file,) = filter(is_numerics, FILES)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == page(load_results(file))


def test_readme_shows_the_committed_results() -> None:
    text = (DOCUMENT.parents[1] / "README.md").read_text(encoding="utf-8")
    found = {}
    for name, operations in (("xeon", ("forward", "backward")), ("xeon-fused", ("forward_backward",))):
        table = compare([row for row in load_rows(RESULTS / f"{name}.json") if row.dtype == "float32"])
        for (_, size, operation), line in means(table).iterrows():
            if operation in operations:
                found[line["layout_shown"], size, operation] = round(line["speedup"], 1)
    for layout in ("contiguous", "channels_last"):
        for size, words in (("> 32 MB", "over 32 MB"), ("1-32 MB", "1 to 32 MB")):
            (shown,) = re.findall(rf"\| {layout}, {words} \| (.*) \|", text)
            expected = [found[layout, size, operation] for operation in ("forward", "backward", "forward_backward")]
            assert [float(number) for number in shown.split("|")] == expected
    slow = compare(load_rows(RESULTS / "xeon.json"))["speedup"]
    assert f"In {sum(slow < 1)} of {len(slow)} single measurements bnext runs at {slow.min():.2f} of" in text


def test_each_kind_has_its_own_block_and_the_rest_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, document = tmp_path / "run.json", tmp_path / "D.md"
    save_rows(file, GPU)
    found = blocks(GPU)
    assert list(found) == ["benchmark:cuda", "benchmark:cuda:fused"]
    empty = "".join("before\n{}\n{}\n".format(*markers(name)) for name in found)
    document.write_text(empty)
    command = ["report", str(file), "--document", str(document)]
    assert main([*command, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert document.read_text() == empty
    assert main(command) == 0
    filled = ("before\n{}\n{block}\n{}\n".format(*markers(name), block=block) for name, block in found.items())
    assert document.read_text() == "".join(filled)
    assert main([*command, "--check"]) == 0


BEGIN, END = markers("benchmark")


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_document_without_one_pair_of_markers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"expected one {BEGIN}"):
        rewritten(text, "benchmark", "block")


def test_bad_documents_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, document = tmp_path / "run.json", tmp_path / "D.md"
    # The document has no block for batch norms with an activation in touched memory.
    save_rows(file, [*GPU, *rows_of(4.0, 1.0, 0.5, act="relu", environment=dict(TOUCHED))])
    document.write_text(text := "".join(marker for name in blocks(GPU) for marker in markers(name)))
    assert main(["report", str(file), "--document", str(document)]) == 2
    assert main(["report", str(file), "--document", str(tmp_path / "nothing.md")]) == 2
    assert main(["report", str(file), "--check"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert document.read_text() == text, "rewritten in part"
