"""Pictures of several runs show what their records say."""

from utils import pictures


def test_equal_epochs_have_a_panel_of_their_own(figures, tmp_path):
    """Curves of other rows are over minutes, theirs over epochs; where there are none there is one panel."""
    epochs = [{"epoch": 1, "seconds": 90, "valid_ppl": 300.0}, {"epoch": 2, "seconds": 30, "valid_ppl": 170.0}]
    record = {"history": {"epochs": epochs}}
    rows = [(name, record) for name in ("lstm-epochs", "lstm-minutes", "rmc-minutes")]
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


def test_the_legend_of_many_curves_hides_none(figures, tmp_path):
    """That of nine rows is beside the axes, that of eight inside."""
    record = {"history": {"epochs": [{"epoch": 1, "seconds": 90, "valid_ppl": 300.0}]}}
    for count in (8, 9):
        pictures.curves_picture([(f"row {number}", record) for number in range(count)], tmp_path / f"{count}.png")
    boxes = [(each.axes[0].get_legend().get_window_extent(), each.axes[0].get_window_extent()) for each in figures]
    assert [legend.x0 < axes.x1 for legend, axes in boxes] == [True, False]
