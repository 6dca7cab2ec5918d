"""What `mpoe demo` found, in the terminal and as a page: tables, bars, tokens in colours and
continuations."""

from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from mpoe.cli.demo_experts import FOREIGN, DemoResults, share_text
from mpoe.cli.report import Table, bars_html, expert_colours, section, tokens_html, write_page

_APART_HEADER = ("domain", "base", "always on", "quiet", "kept", "lost, always on", "lost, quiet")
_APART = (
    "Loss in nats per token on held-out text of the domain, lower is better; kept: the part of the "
    "expert's gain that is left when it is quiet; lost: how much worse the model is on "
    f"{FOREIGN}, held out too, which it knew before. Neither an expert nor the background has seen "
    "any: the background of 'none' is what the model itself says."
)
_TOGETHER_HEADER = ("held-out text", "base", "the three composed", "kept")
_TOGETHER = (
    "One model with the three files, whose routers were solved from the files alone; nobody says "
    "which text is which."
)
_PICTURE = "Every token in the colour of the expert that most layers of this model sent it to."
_CONTINUED = (
    "The most probable tokens after the beginning of each held-out text: before of the base, after "
    f"with the quiet expert of the domain, of {FOREIGN} with all three."
)


def show(results: DemoResults) -> None:
    """Print all of it."""
    _apart(results).show()
    _together(results).show()
    _show_tokens(results)
    _continuations(results).show()
    for line in results.conclusions():
        print(line)
    print(f"{results.seconds:.0f} seconds.")


def write(file: Path, results: DemoResults) -> None:
    """The same as one self-contained HTML file, with bars."""
    gained = []
    lost = []
    for name, domain in results.domains.items():
        gained.append((f"{name}, always on", domain.base - domain.always_on))
        gained.append((f"{name}, quiet", domain.base - domain.quiet))
        lost.append((f"{name}, always on", domain.foreign_lost_always_on))
        lost.append((f"{name}, quiet", domain.foreign_lost_quiet))
    lines = [Markup("<li>{}</li>").format(line) for line in results.conclusions()]
    tokens = tokens_html(results.picture, results.experts)
    parts = [
        Markup("<ul>{}</ul>").format(Markup("").join(lines)),
        _apart(results).section(),
        section("Gained on its domain, nats per token", bars_html(gained)),
        section(f"Lost on {FOREIGN}, nats per token", bars_html(lost)),
        _together(results).section(),
        section("Who took which token", tokens, note=_PICTURE),
        _continuations(results).section(),
    ]
    write_page(file, "mpoe demo: quiet experts", parts)


def _apart(results: DemoResults) -> Table:
    rows = []
    for name, domain in results.domains.items():
        losses = [f"{loss:.3f}" for loss in (domain.base, domain.always_on, domain.quiet)]
        kept = share_text(domain.kept(domain.quiet))
        lost_always_on = f"{domain.foreign_lost_always_on:+.3f}"
        lost_quiet = f"{domain.foreign_lost_quiet:+.3f}"
        rows.append([name, *losses, kept, lost_always_on, lost_quiet])
    title = f"An expert of each domain: {results.steps} steps, seed {results.seed}"
    return Table(_APART_HEADER, rows, title, _APART)


def _together(results: DemoResults) -> Table:
    rows = []
    for name, domain in results.domains.items():
        kept = share_text(domain.kept(domain.composed))
        rows.append([name, f"{domain.base:.3f}", f"{domain.composed:.3f}", kept])
    base = results.foreign_base
    composed = results.foreign_composed
    rows.append([FOREIGN, f"{base:.3f}", f"{composed:.3f}", f"{composed - base:+.3f} lost"])
    return Table(_TOGETHER_HEADER, rows, "All three in one model", _TOGETHER)


def _continuations(results: DemoResults) -> Table:
    rows = []
    for text, continued in results.continued.items():
        rows.append([text, continued["prompt"]])
        rows.append(["before", continued["before"]])
        rows.append(["after", continued["after"]])
    return Table((), rows, "Before and after", _CONTINUED, kind="text")


def _show_tokens(results: DemoResults) -> None:
    console = Console()
    colours = expert_colours(len(results.experts))
    console.print(Text(_PICTURE, style="dim"))
    legend = [
        Text(f" {name} ", f"black on {colour}")
        for name, colour in zip(results.experts, colours, strict=True)
    ]
    console.print(Text(" ").join(legend))
    for text, tokens in results.picture.items():
        coloured = [(token, f"black on {colours[expert]}") for token, expert in tokens]
        console.print(Text.assemble(f"{text}: ", *coloured))
