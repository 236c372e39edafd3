"""HTML pages that load nothing else and run nothing: the frame and the look that every report shares.

A report's template extends `page.html.j2`, fills its blocks, and may import from `macros.html.j2`. Needs jinja2, which
comes with the extras `report`, `train` and `export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mdnet_engines.report.numbers import visible


def render(template: Path, **values: Any) -> str:
    """`template` with `values`. Text is escaped, and what would not show or not encode is shown as escapes.

    Markup (the charts) is taken as it is. A value that the template names and nobody gave is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    return environment.get_template(template.name).render(**values)
