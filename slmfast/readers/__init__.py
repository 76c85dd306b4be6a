"""Readers of raw instruction files, in every sub-format of the seed datasets.

sources.py      the public reading: files of a source in, Record and Rejection out
formats.py      one raw object -> prompt and reply, for each dataset's schema
containers.py   one file -> its raw objects: JSON, JSON lines, CSV, Parquet, gz, zst, tar
json_stream.py  JSON values decoded from a stream that is never held whole
"""

from slmfast.readers.formats import FORMATS
from slmfast.readers.sources import Record, Rejection, check_format, expand_paths, read_source, without_places

__all__ = ["FORMATS", "Record", "Rejection", "check_format", "expand_paths", "read_source", "without_places"]
