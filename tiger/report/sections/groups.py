"""Recall@10 by length of the history, by popularity of the target, and for items that training has not seen."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from tiger.evaluation.evaluator import GroupResult, MethodResult
from tiger.report.figures import COLORS, picture, wilson
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure, method_name, table

TITLE = "For whom it works"

Groups = Mapping[str, GroupResult]
_UNSEEN = "0 to 0"


def render(run: FinishedRun) -> Html:
    """Return one panel per grouping, and the table behind it."""
    methods = run.methods
    panels = {
        "Length of the history": {name: result.by_history_length for name, result in methods.items()},
        "Target's interactions in training": {name: result.by_target_popularity for name, result in methods.items()},
        "Known or new": {name: known_and_new(result) for name, result in methods.items()},
    }
    with picture("Recall@10 by group of users", columns=3, height=3.3, sharey=True, width_ratios=[5, 6, 3]) as drawn:
        for axes, (title, groups) in zip(drawn.axes, panels.items(), strict=True):
            _draw(axes, groups)
            axes.set_title(title)
        drawn.axes[0].set(ylabel="Recall@10", ylim=(0, None))  # after all panels are drawn: they share it
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    heads = ["group", "users", *(method_name(name) for name in methods)]
    rows = []
    for title, groups in panels.items():
        for name, group in next(iter(groups.values())).items():
            rows.append((f"{title}: {_label(name)}", group.users, *(own[name].recall for own in groups.values())))
    caption = (
        "Test users; their number is below each group. Lines: 95 % Wilson intervals. New: training has never seen the "
        "item that the user took next."
    )
    return Html(figure(drawn.svg, caption) + table(heads, rows))


def known_and_new(result: MethodResult) -> dict[str, GroupResult]:
    """Return the groups of users whose target occurs in training, and whose target does not."""
    groups = result.by_target_popularity
    known = [group for name, group in groups.items() if name != _UNSEEN]
    users = sum(group.users for group in known)
    recall = sum(group.users * group.recall for group in known) / users if users else 0.0
    found = {"known": GroupResult(users=users, recall=recall)} if users else {}
    return found | ({"new": groups[_UNSEEN]} if _UNSEEN in groups else {})


def _draw(axes: Axes, by_method: Mapping[str, Groups]) -> None:
    names = list(next(iter(by_method.values())))
    for number, (method, groups) in enumerate(by_method.items()):
        shift = 0.12 * (number - (len(by_method) - 1) / 2)
        color, values = COLORS[number % len(COLORS)], [groups[name].recall for name in names]
        for place, name in enumerate(names):
            low, high = wilson(groups[name].recall, groups[name].users)
            axes.plot([place + shift] * 2, [low, high], color=color, linewidth=2, alpha=0.5)
        axes.plot([place + shift for place in range(len(names))], values, "o", color=color, markersize=5,
                  label=method_name(method))  # fmt: skip
    users = next(iter(by_method.values()))
    axes.set_xticks(range(len(names)), [f"{_label(name)}\n{users[name].users:,}" for name in names], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.5, len(names) - 0.5)


def _label(name: str) -> str:
    low, _, high = name.partition(" to ")
    return low if low == high else name.replace(" to ", "-").replace("over ", ">")
