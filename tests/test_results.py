"""The pages in results/ and the README's tables are what the records beside them say."""

import shutil
import statistics

import pytest

import benchmark
from utils import ahead, planned, report, run_tables, tables


@pytest.mark.parametrize(
    "name", ("speed", "qrnn", "awd", "cuda", "compression", "xeon/speed", "xeon/qrnn", "genoa/speed", "genoa/qrnn")
)
def test_a_page_is_what_its_records_say(name):
    """Each record of a measurement in results/NAME/ is rendered between its markers."""
    page = benchmark.RESULTS / f"{name}.md"
    for path in sorted((benchmark.RESULTS / name).glob("*.json")):
        record = report.read_record(path)
        text = page.read_text(encoding="utf-8").split(f"<!-- {path.stem} -->\n")[1].split(f"<!-- /{path.stem} -->")[0]
        assert text.strip() == tables.RENDERERS[record["kind"]](record).strip(), path.name


@pytest.mark.parametrize("machine", ("xeon", "genoa"))
def test_the_summary_of_the_peers_is_what_the_records_say(machine):
    """Its table, from the records beside it."""
    folder = benchmark.RESULTS / machine
    assert ahead.summary_text(ahead.every(folder)) in (folder / "peers.md").read_text(encoding="utf-8")


def test_the_tables_of_this_repository_are_what_their_records_say(tmp_path):
    """Each page in results/ that has run records, rendered again in a copy, is the same byte for byte."""
    found = []
    for page in sorted(benchmark.RESULTS.glob("*.md")):
        records = [report.read_record(path) for path in page.with_suffix("").glob("*.json")]
        if any(record["kind"] in run_tables.KINDS for record in records):
            shutil.copytree(page.with_suffix(""), tmp_path / page.stem)
            shutil.copy(page, tmp_path)
            planned.render(page.stem, tmp_path, differences="| what differs |" in page.read_text(encoding="utf-8"))
            assert (tmp_path / page.name).read_bytes() == page.read_bytes(), page.name
            found.append(page.stem)
    assert {"rnn-penn", "awd-penn", "awd-ablation"} <= set(found)
    readme = shutil.copy(planned.ROOT / "README.md", tmp_path)
    summary = planned.summary_text(benchmark.RESULTS)
    report.replace_between(readme, planned.SUMMARY, summary)
    assert (tmp_path / "README.md").read_bytes() == (planned.ROOT / "README.md").read_bytes()
    assert "](results/pruning.md)" not in summary, "published of another corpus"


def test_the_settings_of_the_readme_are_those_of_the_record():
    """Medians of the ratios, to two digits."""
    rows = report.read_record(benchmark.RESULTS / "genoa" / "speed" / "settings.json")["rows"]
    plain = {row["name"]: row["ms"] for row in rows if row["setting"] == "as it comes"}
    ratios = {}
    for row in rows:
        ratio = statistics.median(own / first for own, first in zip(row["ms"], plain[row["name"]], strict=True))
        ratios.setdefault(row["setting"], {})[row["name"]] = f"{ratio:.2f}"
    text = (benchmark.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for setting, measured in ratios.items():
        if setting not in ("as it comes", "--onednn"):  # on this processor oneDNN's products are how it comes
            assert f"| `{setting}` | {' | '.join(measured.get(name, '') for name in plain)} |" in text, setting
