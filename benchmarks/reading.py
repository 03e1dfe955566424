"""Seconds of reading a DICOM series in each packing, by read_volume and by SimpleITK (GDCM), in turns.

    python -m benchmarks.reading
    python -m benchmarks.reading --slices 100 --processors 1

The series is synthetic: a round body with the noise of a CT. Both readers find the slices in the folder, order and decode them, and must
give the same HU, or the program fails; read_volume checks geometry and unit besides. The first run of each warms up; the median of
the others counts. `--processors` limits both readers. Writes <output>/reading.json.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from med3dvlm import read_volume
from med3dvlm.files import write_json
from med3dvlm.programs import Parser, positive, run

DISTINCT = 10  # slices; a longer series repeats them, as packing takes longer than reading
Picture = NDArray[np.uint16]


def run_lengths(picture: Picture) -> bytes:
    """The high bytes, then the low ones, each row by itself."""
    planes = [(picture >> 8).astype(np.uint8), (picture & 255).astype(np.uint8)]
    parts = [b"".join(imagecodecs.packbits_encode(row.tobytes()) for row in plane) for plane in planes]
    parts = [part + b"\0" * (len(part) % 2) for part in map(bytes, parts)]
    return np.array([2, 64, 64 + len(parts[0]), *[0] * 13], "<u4").tobytes() + b"".join(parts)


PACKINGS: dict[str, tuple[UID, Callable[[Picture], bytes] | None]] = {
    "plain": (ExplicitVRLittleEndian, None),
    "plain, implicit": (ImplicitVRLittleEndian, None),
    "RLE": (RLELossless, run_lengths),
    "JPEG lossless": (JPEGLosslessSV1, lambda picture: imagecodecs.jpeg8_encode(picture, lossless=True, bitspersample=16, predictor=1)),
    "JPEG-LS": (JPEGLSLossless, imagecodecs.jpegls_encode),
    "JPEG 2000": (JPEG2000Lossless, lambda picture: imagecodecs.jpeg2k_encode(picture, level=0, reversible=True, codecformat="j2k")),
}


def body(slices: int, size: int) -> NDArray[np.int16]:
    """HU (slices, size, size): air, a body with a rim of bone, noise of 12 HU."""
    z, y, x = np.ogrid[-0.6 : 0.6 : slices * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    radius = np.sqrt(z**2 + y**2 + (1.2 * x) ** 2)
    hu = np.where(radius < 0.8, 40, -1000) + np.where((radius >= 0.72) & (radius < 0.8), 700, 0)
    noise = np.random.default_rng(0).normal(0, 12, hu.shape)
    return np.clip(np.rint(hu + noise), -1024, 3071).astype(np.int16)


def write(folder: Path, hu: NDArray[np.int16], slices: int, syntax: UID, pack: Callable[[Picture], bytes] | None) -> int:
    """A series of so many slices that repeats those of `hu`; the bytes of its pixels."""
    folder.mkdir()
    contents = [(picture.astype(np.int32) + 1024).astype(np.uint16) for picture in hu]
    packed = [picture.tobytes() if pack is None else encapsulate([bytes(pack(picture))]) for picture in contents]
    series, study = generate_uid(), generate_uid()
    for index in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = CTImageStorage, generate_uid(), syntax
        item = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        item.SeriesInstanceUID, item.StudyInstanceUID, item.FrameOfReferenceUID = series, study, study
        item.Modality, item.InstanceNumber, item.ImageType = "CT", index + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        item.PatientID, item.SeriesDescription, item.Manufacturer = "BENCHMARK", "synthetic", "none"
        item.ImageOrientationPatient, item.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-180, -180, index]
        item.PixelSpacing, item.SliceThickness = [0.7, 0.7], 1
        item.Rows, item.Columns = hu.shape[1:]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 1, -1024, "HU"
        item.PixelData = packed[index % len(packed)]
        item["PixelData"].VR, item["PixelData"].is_undefined_length = ("OB", True) if pack else ("OW", False)
        item.save_as(folder / f"{index:05d}.dcm", enforce_file_format=True)
    return sum(len(packed[index % len(packed)]) for index in range(slices))


def by_itk(folder: Path) -> NDArray[Any]:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def by_us(folder: Path) -> NDArray[Any]:
    return read_volume(folder).array


READERS = {"ours": by_us, "SimpleITK": by_itk}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=positive, default=300, help="of the series (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=512, help="rows and columns (default: %(default)s)")
    parser.add_argument("--packings", nargs="+", choices=PACKINGS, default=[*PACKINGS], help="default: all")
    parser.add_argument("--repeats", type=positive, default=5, help="runs that count (default: %(default)s)")
    parser.add_argument("--processors", type=positive, help="that both readers may use (default: all)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    if arguments.processors:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.processors])
    processors = len(os.sched_getaffinity(0))
    hu = body(min(DISTINCT, arguments.slices), arguments.size)
    truth = np.stack([hu[index % len(hu)] for index in range(arguments.slices)])
    results: dict[str, Any] = {
        "slices": arguments.slices, "size": arguments.size, "repeats": arguments.repeats, "processors": processors,
        "processor": platform.processor() or platform.machine(), "packings": {},
    }  # fmt: skip
    print(f"{'packing':17}{'MB':>7}" + "".join(f"{name + ', s':>14}" for name in READERS) + f"{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.packings:
            size = write(Path(folder, name), hu, arguments.slices, *PACKINGS[name])
            seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
            for repeat in range(arguments.repeats + 1):
                for reader, read in READERS.items():
                    started = time.perf_counter()
                    array = read(Path(folder, name))
                    if repeat:  # the first warms up
                        seconds[reader].append(time.perf_counter() - started)
                    if not np.array_equal(array, truth):
                        raise ValueError(f"{name}: {reader} gives other values than were written")
            medians = {reader: statistics.median(times) for reader, times in seconds.items()}
            ratio = statistics.median(one / other for one, other in zip(*seconds.values(), strict=True))
            results["packings"][name] = {"bytes": size, "seconds": seconds, "median": medians, "ratio": ratio}
            print(f"{name:17}{size / 1e6:7.1f}" + "".join(f"{median:14.3f}" for median in medians.values()) + f"{ratio:8.2f}", flush=True)
    write_json(arguments.output / "reading.json", results)
    print(
        f"{arguments.slices} slices of {arguments.size} x {arguments.size}, {processors} processors, medians of {arguments.repeats} runs; "
        f"a ratio below 1 is quicker than SimpleITK; {arguments.output / 'reading.json'}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
