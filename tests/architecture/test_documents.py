"""The documents say what the code does: every setting, every problem code and every command they name is real."""

import re

from store.settings import Settings
from tests.conftest import ROOT


def settings_table() -> str:
    """The table of docs/settings.md, made from the Settings class."""
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for field in Settings.model_fields.values():
        name = field.validation_alias.choices[0]
        default = "" if field.default in (None, "", ()) else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def test_every_setting_is_documented_as_it_is() -> None:
    assert settings_table() in (ROOT / "docs" / "settings.md").read_text(), "docs/settings.md should hold:\n" + settings_table()


def test_relative_links_of_the_documents_lead_somewhere() -> None:
    dead = []
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text()):
            if not (document.parent / target).exists():
                dead.append(f"{document.relative_to(ROOT)}: {target}")
    assert dead == []


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test", "up"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), f"README.md names `make {target}`"
