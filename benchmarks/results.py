"""The page of results, with sections that the benchmarks write themselves."""

from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def write_section(name: str, text: str) -> None:
    """Replaces the generated section of RESULTS.md that stands between the comments of this name."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = RESULTS.read_text().split(start)
    RESULTS.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}")
