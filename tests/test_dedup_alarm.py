"""The alarm of a row that stands for suspiciously many others."""

import re
import warnings

import numpy as np
import pytest

from slmfast import dedup
from slmfast.near_duplicates import Cluster, DedupResult, LargeClusterWarning


def different(count: int) -> list[str]:
    """Texts that are nobody's near-duplicates."""
    return [f"{i * 7919} number {i * i} and {i**3}" for i in range(count)]


def test_a_large_cluster_warns_with_its_row_size_and_remedy():
    texts = [*different(30), *["the same template"] * 11, *different(30)[::-1]]
    with pytest.warns(LargeClusterWarning, match=r"row 30 stands for 11 of 71 rows \(15.5%\).*lower k") as caught:
        result = dedup(texts)
    assert result.largest_cluster == Cluster(row=30, size=11)
    assert caught[0].filename == __file__  # it points at the call
    assert result.alarm("the first") == str(caught[0].message).replace("row 30", "the first", 1)


@pytest.mark.parametrize(
    ("alike", "others", "loud"), [(10, 0, False), (11, 0, True), (20, 1980, False), (21, 1979, True)]
)
def test_the_alarm_is_over_ten_rows_and_one_percent(alike, others, loud):
    keep = np.ones(alike + others, bool)
    keep[1:alike] = False
    duplicate_of = np.where(keep, np.arange(len(keep)), 0)
    result = DedupResult(keep, duplicate_of, np.zeros(len(keep), np.uint8))
    assert result.largest_cluster == (0, alike)
    assert (result.alarm() is not None) == loud


def test_clusters_of_an_index_are_named_by_its_ids():
    ids = np.array([-5, 10**15, 7, -5, 10**15, 10**15])
    result = DedupResult(np.array([1, 1, 1, 0, 0, 0], bool), ids, np.zeros(6, np.uint8))
    assert result.largest_cluster == (10**15, 3)


def test_small_tables_do_not_shout():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dedup(["a template for all"] * 10)
        dedup([None, ""] * 50)
        assert dedup([]).largest_cluster == Cluster(-1, 0)
        assert dedup(different(20)).largest_cluster == Cluster(0, 1)


def test_the_largest_cluster_is_the_first_of_equals():
    texts = different(5)
    texts = [texts[0], texts[3], *texts, texts[4]]
    result = dedup(texts)
    rows, sizes = np.unique(result.duplicate_of, return_counts=True)
    assert result.largest_cluster == (rows[sizes.argmax()], sizes.max()) == (0, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = dedup(["x y z 1 2 3"] * 12 + ["other text here"] * 13)
    assert result.largest_cluster == (12, 13)
    assert re.match("row 12 stands for 13 of 25", str(caught[0].message))
