"""The viewer's measurements against numpy: distances, regions, slabs, the value under the mouse, and zoom."""

import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from .browsing import count, expect, opened, upload, wait_for
from .test_scans import mixed_series, two_series

SPACING = np.array([2.5, 1.3, 0.7])  # z, y, x
PLANES = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}  # cut axis, axis of the rows, axis of the columns


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    """Returns the array (z, y, x) as the viewer shows it: superior, anterior and the patient's right come first."""
    return np.random.default_rng(11).integers(-1000, 2000, (13, 22, 34)).astype(np.int16)


@pytest.fixture(scope="module")
def volume(shown: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volume") / "scan.nii.gz"
    right, anterior, superior = (np.diag([mm, mm, mm, 1.0])[axis] for axis, mm in ((0, SPACING[2]), (1, SPACING[1]), (2, SPACING[0])))
    stored = shown.transpose(2, 1, 0)[::-1, ::-1, ::-1]  # (x, y, z) to the patient's right, anterior, superior: the first voxel last
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(stored), np.stack([right, anterior, superior, [0, 0, 0, 1]])), path)
    return path


@pytest.fixture
def page(visit: Any, volume: Path) -> Any:
    page = visit(1600, 1000)
    opened(page, volume)
    return page


def screen(page: Any, plane: str, column: float, row: float, size: tuple[int, ...]) -> tuple[float, float]:
    """Returns the screen position of a voxel of a plane, counted from the upper left corner, at the first zoom: the picture fills its canvas."""
    box = page.locator(f"[data-plane={plane}] canvas").bounding_box()
    _, rows, columns = PLANES[plane]
    height, width = size[rows] * SPACING[rows], size[columns] * SPACING[columns]
    pixels = min(box["height"] / height, box["width"] / width)  # a mm
    left, top = box["x"] + (box["width"] - pixels * width) / 2, box["y"] + (box["height"] - pixels * height) / 2
    return left + pixels * column * SPACING[columns], top + pixels * row * SPACING[rows]


def drag(page: Any, plane: str, start: tuple[float, float], end: tuple[float, float], size: tuple[int, ...]) -> None:
    page.mouse.move(*screen(page, plane, *start, size))
    page.mouse.down()
    page.mouse.move(*screen(page, plane, *end, size), steps=3)
    page.mouse.up()


def measured(page: Any, number: int) -> str:
    expect(page.locator(".measures li")).to_have_count(number)
    return page.locator(".measures li .go").last.text_content()


def numbers(words: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", words.partition(":")[2].partition(":")[2])]


def slices(page: Any) -> dict[str, int]:
    return {plane: int(count(page, plane).split("/")[0]) - 1 for plane in PLANES}


def value(page: Any, plane: str = "axial") -> str:
    return page.locator(f"[data-plane={plane}] .value").text_content()


@pytest.mark.parametrize("plane", list(PLANES))
def test_distances_are_in_millimetres_of_each_plane(page, shown, plane) -> None:
    _, rows, columns = PLANES[plane]
    page.get_by_role("button", name="Distance", exact=True).click()
    start, end = (3.0, 2.0), (11.0, 8.0)
    drag(page, plane, start, end, shown.shape)
    expected = np.hypot(8 * SPACING[columns], 6 * SPACING[rows])
    assert numbers(measured(page, 1))[0] == pytest.approx(expected, abs=0.3)  # the mouse stands on whole pixels
    assert page.locator("#viewer [data-at]").get_attribute("data-at") == "6,10,16"  # drawing moves nothing
    drag(page, plane, end, (11.0, 2.0), shown.shape)  # the end is taken again
    assert numbers(measured(page, 1))[0] == pytest.approx(8 * SPACING[columns], abs=0.3)
    drag(page, plane, (5.0, 5.0), (5.0, 5.0), shown.shape)  # a click draws nothing
    expect(page.locator(".measures li")).to_have_count(1)


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("kind", ["Ellipse", "Rectangle"])
def test_region_statistics_equal_numpy(page, shown, plane, kind) -> None:
    cut, rows, columns = PLANES[plane]
    section = np.take(shown, slices(page)[plane], axis=cut).astype(float)  # rows before columns, as the axes stand in PLANES
    page.get_by_role("button", name=kind, exact=True).click()
    (left, top), (right, bottom) = start, end = (2.2, 1.3), (11.8, 9.7)
    drag(page, plane, start, end, shown.shape)
    y, x = np.mgrid[: section.shape[0], : section.shape[1]] + 0.5
    across, down = (x - (left + right) / 2) / ((right - left) / 2), (y - (top + bottom) / 2) / ((bottom - top) / 2)
    inside = across**2 + down**2 <= 1 if kind == "Ellipse" else (abs(across) <= 1) & (abs(down) <= 1)
    chosen = section[inside]
    area = (right - left) * (bottom - top) * SPACING[columns] * SPACING[rows] * (np.pi / 4 if kind == "Ellipse" else 1)
    mean, deviation, least, most, found_area, voxels = numbers(measured(page, 1).replace("mm²", ""))
    assert voxels == chosen.size
    assert (least, most) == (chosen.min(), chosen.max())
    assert mean == pytest.approx(chosen.mean(), abs=0.051) and deviation == pytest.approx(chosen.std(), abs=0.051)
    assert found_area == pytest.approx(area, rel=0.02)


def test_measuring_by_keyboard(page, shown) -> None:
    axial = page.locator("[data-plane=axial]")
    axial.press("d")
    for _ in range(4):
        axial.press("Shift+ArrowRight")
    for _ in range(3):
        axial.press("Shift+ArrowDown")
    axial.press("d")
    wait_for(lambda: numbers(measured(page, 1))[0] == round(float(np.hypot(4 * SPACING[2], 3 * SPACING[1])), 1))
    axial.press("Shift+ArrowDown")  # it has ended
    axial.press("b")
    for key in ("Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown", "Shift+ArrowDown", "Enter"):
        axial.press(key)

    def agrees() -> bool:
        z, y, x = (int(place) for place in page.locator("#viewer [data-at]").get_attribute("data-at").split(","))
        chosen = shown[z, y - 2 : y + 1, x - 2 : x + 1]  # from middle to middle, both inside
        found = numbers(measured(page, 2).replace("mm²", ""))
        return found[0] == pytest.approx(chosen.mean(), abs=0.051) and found[-1] == 9

    wait_for(agrees, 10)  # the crosshair's place is told with the next frame
    z = slices(page)["axial"]
    axial.press("e")
    axial.press("Escape")
    expect(page.locator(".measures li")).to_have_count(2)
    axial.press("Delete")
    expect(page.locator(".measures li")).to_have_count(1)
    axial.press("PageDown")
    page.locator(".measures .go").click()  # back to the slice where it lies
    wait_for(lambda: slices(page)["axial"] == z)
    page.get_by_label("Remove measurement 1").click()
    expect(page.locator(".measures li")).to_have_count(0)


def test_the_value_under_the_mouse(page, shown) -> None:
    at = slices(page)
    assert value(page) == f"{shown[6, 10, 16]} HU"  # of the crosshair
    for plane, (cut, _, _) in PLANES.items():
        for column, row in ((1, 2), (9, 5)):
            page.mouse.move(*screen(page, plane, column + 0.5, row + 0.5, shown.shape))
            wait_for(lambda: value(page, plane) == f"{np.take(shown, at[plane], axis=cut)[row, column]} HU", 5)  # noqa: B023
    page.mouse.move(5, 5)
    wait_for(lambda: value(page) == f"{shown[6, 10, 16]} HU", 5)


def test_zoom_keeps_the_voxel_under_the_mouse(page, shown) -> None:
    page.mouse.move(*screen(page, "axial", 4.5, 15.5, shown.shape))
    expected = f"{shown[6, 15, 4]} HU"
    wait_for(lambda: value(page) == expected, 5)
    page.keyboard.down("Control")
    for _ in range(12):
        page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_timeout(100)
    page.mouse.move(*np.add(screen(page, "axial", 4.5, 15.5, shown.shape), 1))
    wait_for(lambda: value(page) == expected, 5)
    page.get_by_role("button", name="Reset").click()
    page.mouse.move(*screen(page, "axial", 20.5, 3.5, shown.shape))
    wait_for(lambda: value(page) == f"{shown[6, 3, 20]} HU", 5)
    page.locator("[data-plane=axial]").press("+")  # the key, too
    page.mouse.move(*np.add(screen(page, "axial", 20.5, 3.5, shown.shape), 1))
    wait_for(lambda: value(page) == f"{shown[6, 3, 20]} HU", 5)


@pytest.mark.parametrize(("mode", "of"), [("MIP", np.max), ("MinIP", np.min), ("Mean", np.mean)])
def test_slabs(page, shown, mode, of) -> None:
    page.get_by_label("Slab", exact=True).select_option(mode)
    page.get_by_label("Slab thickness in mm").fill("7.6")
    page.get_by_label("Slab thickness in mm").press("Enter")
    at = slices(page)
    for plane, (cut, _, _) in PLANES.items():
        many = max(1, round(7.6 / SPACING[cut]))  # 3, 6 and 11 slices
        first = at[plane] - (many - 1) // 2
        expected = of(np.take(shown, range(max(first, 0), min(first + many, shown.shape[cut])), axis=cut).astype(float), axis=cut)
        page.mouse.move(*screen(page, plane, 7.5, 4.5, shown.shape))
        wait_for(lambda: value(page, plane) == f"{mode} {float(np.round(expected[4, 7], 1)):g} HU", 5)  # noqa: B023
    page.locator("[data-plane=axial]").press("Home")  # at the end of the scan the slab is cut
    expected = of(shown[:2].astype(float), axis=0)
    page.mouse.move(*screen(page, "axial", 7.5, 4.5, shown.shape))
    wait_for(lambda: value(page) == f"{mode} {float(np.round(expected[4, 7], 1)):g} HU", 5)
    page.get_by_role("button", name="Rectangle", exact=True).click()
    drag(page, "axial", (2.0, 2.0), (9.0, 8.0), shown.shape)
    assert numbers(measured(page, 1))[0] == pytest.approx(expected[2:8, 2:9].mean(), abs=0.051)


def test_cine_full_screen_and_key_images(page) -> None:
    coronal = page.locator("[data-plane=coronal]")
    coronal.focus()
    page.get_by_label("Slices a second").fill("30")
    before = slices(page)
    page.get_by_role("button", name="Play", exact=True).click()
    wait_for(lambda: slices(page)["coronal"] < before["coronal"])  # it begins again after the last
    page.get_by_role("button", name="Pause", exact=True).click()
    page.wait_for_timeout(100)
    now = slices(page)
    page.wait_for_timeout(150)
    assert slices(page) == now and now["axial"] == before["axial"]
    coronal.press("p")
    wait_for(lambda: slices(page) != now)
    coronal.press("p")
    coronal.press("f")
    wait_for(lambda: page.evaluate("document.fullscreenElement?.className") == "workstation")
    box = page.locator("[data-plane=axial] canvas").bounding_box()
    assert box["height"] > 700
    page.evaluate("document.exitFullscreen()")
    coronal.press("k")
    page.get_by_role("tab", name="Report").click()
    expect(page.locator(".pictures img")).to_have_count(1)
    expect(page.locator(".pictures figcaption")).to_contain_text(f"coronal, slice {slices(page)['coronal'] + 1} of 22")
    assert page.locator(".pictures img").evaluate("image => image.decode().then(() => image.naturalWidth > 0)")
    page.locator(".pictures .remove").click()
    expect(page.locator(".pictures img")).to_have_count(0)


def test_a_series_of_the_study_is_chosen(visit, tmp_path) -> None:
    page = visit()
    files, _ = two_series(tmp_path)
    opened(page, *files)
    choice = page.get_by_label("Series of the study")
    assert "/ 8" in count(page) and choice.locator("option").count() == 2
    page.get_by_role("tab", name="Report").click()
    page.locator("#report textarea").fill("Of the long one.")
    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    shown = choice.input_value()
    other = next(value for value in ("1", "2") if value != shown)
    choice.select_option(other)
    wait_for(lambda: asked)
    expect(choice).to_have_value(shown)
    page.once("dialog", lambda dialog: dialog.accept())
    choice.select_option(other)
    wait_for(lambda: "/ 5" in count(page))
    expect(choice).to_have_value(other)
    expect(page.locator("#report textarea")).to_have_value("")
    page.get_by_role("button", name="Chest phantom").click()
    expect(choice).to_be_hidden()


def test_a_series_of_an_ambiguous_study_is_chosen(visit, tmp_path) -> None:
    page = visit()
    upload(page, *mixed_series(tmp_path / "mixed"))
    choice = page.get_by_label("Series of the study")
    expect(choice.locator("option")).to_have_text([re.compile("choose"), re.compile("1: .*slices"), re.compile("2: .*slices")])
    expect(page.locator("#status")).to_contain_text("choose one by series number")
    choice.select_option("2")
    wait_for(lambda: "/ 4" in count(page, "coronal"))
    expect(choice).to_have_value("2")
    expect(choice.locator("option")).to_have_count(2)


def test_measurements_are_removed_with_their_scan(page, scan) -> None:
    page.locator("[data-plane=axial]").press("d")
    page.locator("[data-plane=axial]").press("Shift+ArrowRight")
    page.locator("[data-plane=axial]").press("Enter")
    expect(page.locator(".measures li")).to_have_count(1)
    upload(page, scan(12))
    wait_for(lambda: "/ 12" in count(page))
    expect(page.locator(".measures li")).to_have_count(0)
