"""HTML pages that need nothing else: no script, no network, every picture and style inside."""

from importlib.resources import files
from typing import Any

import jinja2

from attire.evaluation.intervals import percent


def render(template: str, **values: Any) -> str:
    """The page of template `attire/<template>`, such as `evaluation/report.html`, filled with these values.

    Equal values give equal pages. Text is escaped.
    """
    loader = jinja2.FunctionLoader(lambda name: files("attire").joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    environment.globals["percent"] = percent
    return environment.get_template(template).render(**values)
