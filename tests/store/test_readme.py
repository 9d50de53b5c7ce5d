"""The room's README shows only what works."""

import re
from pathlib import Path

import distill.store


def test_the_readmes_python_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    text = (Path(distill.store.__file__).parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    said = re.search(r"print\(difference\)  # (.*)", block)[1]
    assert capsys.readouterr().out == f"{said}\n"
