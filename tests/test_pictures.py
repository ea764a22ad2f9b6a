"""Pictures of several runs show what their records say."""

from utils import pictures


def test_equal_epochs_have_a_panel_of_their_own(figures, tmp_path):
    """Curves of other rows are over minutes, theirs over epochs; where there are none there is one panel."""
    epochs = [
        {"epoch": 1, "seconds": 90, "part": 1.0, "valid_ppl": 300.0},
        {"epoch": 2, "seconds": 30, "part": 1.0, "valid_ppl": 170.0},
    ]
    record = {"history": {"epochs": epochs}}
    rows = [(name, [record]) for name in ("lstm-epochs", "lstm-minutes", "rmc-minutes")]
    pictures.curves_picture(rows, tmp_path / "both.png")
    pictures.curves_picture(rows[1:], tmp_path / "one.png")
    shown = [
        [
            (axes.get_xlabel(), [(line.get_label(), *line.get_xdata()) for line in axes.get_lines()])
            for axes in each.axes
        ]
        for each in figures
    ]
    minutes = ("minutes of training", [("lstm-minutes: 170.0", 1.5, 2.0), ("rmc-minutes: 170.0", 1.5, 2.0)])
    assert shown == [[minutes, ("epochs of training", [("lstm-epochs: 170.0", 1, 2)])], [minutes]]
    assert all(tick == int(tick) for tick in figures[0].axes[1].get_xticks())


def test_every_seed_is_drawn_in_one_colour(figures, tmp_path):
    """The legend has the lowest of each; the next row has another colour."""
    first, second = (
        {"history": {"epochs": [{"epoch": 1, "seconds": 60, "part": 1.0, "valid_ppl": ppl}]}} for ppl in (300.0, 310.0)
    )
    pictures.curves_picture([("lstm", [first, second]), ("rmc", [second])], tmp_path / "seeds.png")
    lines = figures[0].axes[0].get_lines()
    assert [line.get_color() for line in lines] == ["C0", "C0", "C1"]
    assert figures[0].axes[0].get_legend_handles_labels()[1] == ["lstm: 300.0, 310.0", "rmc: 310.0"]
    assert [list(line.get_ydata()) for line in lines] == [[300.0], [310.0], [310.0]]


def test_what_is_beyond_the_picture_is_said(figures, tmp_path):
    """A perplexity at once far above all others stands at the edge, one within does not."""
    trained = {"kind": "training", "model": {"pruned": 7, "parameters": 10}, "results": {"test": {"perplexity": 90.0}}}
    at_once = [
        {"kind": "evaluation of a checkpoint", "model": {"pruned": part, "parameters": 10}, "results": results}
        for part, results in ((5, {"test": {"perplexity": 95.0}}), (8, {"test": {"perplexity": 1234.5}}))
    ]
    rows = [("agp", 85.0, trained), *(("once", None, record) for record in at_once)]
    pictures.sparsity_picture(rows, tmp_path / "sparsity.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["agp", "at once: 1,234"]


def test_the_legend_of_many_curves_hides_none(figures, tmp_path):
    """That of nine rows is beside the axes, that of eight inside."""
    record = {"history": {"epochs": [{"epoch": 1, "seconds": 90, "part": 1.0, "valid_ppl": 300.0}]}}
    for count in (8, 9):
        pictures.curves_picture([(f"row {number}", [record]) for number in range(count)], tmp_path / f"{count}.png")
    boxes = [(each.axes[0].get_legend().get_window_extent(), each.axes[0].get_window_extent()) for each in figures]
    assert [legend.x0 < axes.x1 for legend, axes in boxes] == [True, False]


def test_an_epoch_that_was_cut_is_no_whole_one(figures, tmp_path):
    """Its point stands where it was cut."""
    epochs = [{"seconds": 90, "part": part, "valid_ppl": 300.0} for part in (1.0, 0.25)]
    pictures.curves_picture([("lstm-epochs", [{"history": {"epochs": epochs}}])], tmp_path / "cut.png")
    assert list(figures[0].axes[0].get_lines()[0].get_xdata()) == [1.0, 1.25]
