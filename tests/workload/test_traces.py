"""Every trace format is read exactly, and every flaw of a file is named with its line."""

from __future__ import annotations

import cProfile
import gzip
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from helios_sim.errors import InputError
from helios_sim.runs.columns import REQUEST_COLUMNS
from helios_sim.workload.requests import WorkloadSettings, generate
from helios_sim.workload.trace import Trace, TraceSettings
from helios_sim.workload.traces import doubtful_times, is_drawn, read_trace, spread_equal

SHIPPED = Path(__file__).resolve().parents[2] / "scenarios" / "traces"
AZURE = SHIPPED / "azure_llm_2023"

AZURE_TEXT = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51,879,55
"""
BURSTGPT_TEXT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118.5,GPT-4,417,276,693,API log
"""
MOONCAKE_TEXT = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 0, "input_length": 7322, "output_length": 490, "hash_ids": [0]}
{"timestamp": 0, "input_length": 7236, "output_length": 794, "hash_ids": []}

{"timestamp": 3000, "input_length": 2287, "output_length": 316, "hash_ids": [7]}
{"timestamp": 3000, "input_length": 9013, "output_length": 3, "hash_ids": [8]}
"""


def read(path: Path, content: str | bytes | None = None, **keys: Any) -> Trace:
    """The trace in a file, written first if its content is given."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    seed = keys.pop("seed", 1)
    return read_trace(TraceSettings(file=path.name, **keys), path.parent, seed)


@pytest.mark.parametrize(
    ("name", "num", "prompt", "output", "rate", "cv"),
    [
        ("conv", 19_366, (1020, 2735, 4142), (129, 424, 601), 5.53, 1.09),
        ("code", 8_819, (1469, 5188, 7436), (13, 55, 251), 2.57, 13.15),
    ],
)
def test_the_shipped_azure_traces_have_their_published_figures(
    name: str,
    num: int,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    rate: float,
    cv: float,
) -> None:
    """Rows, rate, inter-arrival CV and the 50th, 90th and 99th percentiles of both lengths."""
    trace = read(AZURE / f"AzureLLMInferenceTrace_{name}.csv.gz")
    assert trace.format == "azure"
    assert len(trace) == num
    assert np.percentile(trace.prompt_tokens, [50, 90, 99]) == pytest.approx(prompt, abs=0.51)
    assert np.percentile(trace.output_tokens, [50, 90, 99]) == pytest.approx(output, abs=0.51)
    gaps = np.diff(trace.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.006)
    assert 1 / gaps.mean() == pytest.approx(rate, abs=0.006)
    assert trace.arrival_s[0] == 0.0


def test_the_shipped_traces_are_read_as_columns() -> None:
    """Python does nothing line by line."""
    profiler = cProfile.Profile()
    trace = profiler.runcall(read, AZURE / "AzureLLMInferenceTrace_conv.csv.gz")
    assert len(trace) > 10_000
    assert sum(entry.callcount for entry in profiler.getstats()) < 5_000


def test_the_shipped_traces_are_small_dateless_gzip_with_licence_and_notice() -> None:
    """A modification time of 0 in the header, under 400 kB together, nothing without a licence."""
    for path in AZURE.glob("*.gz"):
        assert path.read_bytes()[4:8] == b"\0\0\0\0"
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 400_000
    for folder in (path for path in SHIPPED.iterdir() if path.is_dir()):
        assert (folder / "NOTICE.md").is_file()
        assert list(folder.glob("LICENSE-*.txt"))


def test_azure_rows_keep_the_digits_of_their_times(tmp_path: Path) -> None:
    """100 ns digits survive; a time without a fraction is read; the first is at 0."""
    trace = read(tmp_path / "a.csv", AZURE_TEXT)
    assert trace.format == "azure"
    assert trace.arrival_s.tolist() == [0.0, 4.314579, 4.31941]
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]
    assert trace.prompt_tokens.dtype == trace.output_tokens.dtype == np.int32


@pytest.mark.parametrize("ending", ["\r\n", "\n\n", "\r"])
def test_line_ends_blank_lines_a_mark_and_gzip_do_not_matter(tmp_path: Path, ending: str) -> None:
    """The same rows with carriage returns or blank lines, a byte order mark, and compressed."""
    content = b"\xef\xbb\xbf" + AZURE_TEXT.replace("\n", ending).encode()
    for name, data in (("a.csv", content), ("a.csv.gz", gzip.compress(content))):
        assert read(tmp_path / name, data).prompt_tokens.tolist() == [374, 396, 879]


def test_a_column_of_ones_own_may_be_called_line(tmp_path: Path) -> None:
    text = "line,in,out\n1,2,3\n4,5,6\n"
    trace = read(tmp_path / "a.csv", text, columns={**OWN, "arrival": "line"})
    assert trace.arrival_s.tolist() == [0.0, 3.0]


@pytest.mark.parametrize("name", ["line", "", "TIMESTAMP_duplicated_0", "^.*$"])
def test_further_columns_do_not_matter_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    """Nor do two further columns of one name."""
    for text in (wider(AZURE_TEXT, name), wider(wider(AZURE_TEXT, name), f" {name}")):
        assert read(tmp_path / "a.csv", text).prompt_tokens.tolist() == [374, 396, 879]


def test_azure_times_with_a_utc_offset_are_read(tmp_path: Path) -> None:
    """The later data set writes +00:00 behind its times."""
    text = re.sub(r"(\d),(374|396|879)", r"\1+00:00,\2", AZURE_TEXT)
    assert text.count("+00:00") == 3
    assert read(tmp_path / "a.csv", text).arrival_s.tolist() == [0.0, 4.314579, 4.31941]


def test_burstgpt_failures_are_dropped_and_counted(tmp_path: Path) -> None:
    """A row answered with no token is no request; times count from the first request."""
    trace = read(tmp_path / "b.csv", BURSTGPT_TEXT)
    assert trace.format == "burstgpt"
    assert trace.num_dropped == 1
    assert trace.arrival_s.tolist() == [0.0, 113.5]
    assert trace.prompt_tokens.tolist() == [472, 417]
    assert trace.output_tokens.tolist() == [18, 276]
    table = {"trace": {"file": "b.csv"}}
    requests = generate(WorkloadSettings.model_validate(table), 1, tmp_path, ("prose",))
    assert requests.num_dropped == 1


OWN = {"arrival": "sent", "prompt": "in", "output": "out"}


@pytest.mark.parametrize(
    "times",
    [
        ("5", "6.5", "125"),
        ("2024-02-29 23:59:58", "2024-02-29 23:59:59.5", "2024-03-01 00:01:58"),
        ("2024-02-29T23:59:58Z", "2024-02-29T23:59:59.500Z", "2024-03-01T00:01:58Z"),
        ("2024-02-29 23:59:58+00:00", "2024-02-29 23:59:59.5+00:00", "2024-03-01 00:01:58+00:00"),
        ("2024-02-29T23:59:58+02:00", "2024-02-29T22:59:59.5 +0100", "2024-02-29T18:31:58-03:30"),
        ("2024-02-29 23:59:58+02", "2024-02-29 21:59:59.5Z", "2024-03-01 00:01:58+02"),
        ("1709251198.0", "1709251199.5", "1709251318"),
    ],
)
@pytest.mark.parametrize("format", ["auto", "csv"])
def test_a_csv_of_any_names_is_read_by_its_columns(
    tmp_path: Path, times: tuple[str, ...], format: str
) -> None:
    """Arrivals are seconds or calendar times; the columns may stand in any order."""
    rows = [f"7,{time},x,{place + 1}\n" for place, time in enumerate(times)]
    text = "out,sent,who,in\n" + "".join(rows) + f"0,{times[-1]},x,9\n"
    trace = read(tmp_path / "a.csv", text, columns=OWN, format=format)
    assert trace.format == "csv"
    assert trace.arrival_s.tolist() == [0.0, 1.5, 120.0]
    assert trace.prompt_tokens.tolist() == [1, 2, 3]
    assert trace.output_tokens.tolist() == [7, 7, 7]
    assert trace.num_dropped == 1


def test_a_name_that_another_column_has_is_no_likely_mistake(tmp_path: Path) -> None:
    columns = {"arrival": "sent", "prompt": "tokens_in", "output": "tokens_out"}
    with pytest.raises(InputError, match=r"must name sent, tokens_in, tokens_out\.$"):
        read(tmp_path / "a.csv", "sent,tokens_out\n1,2\n", columns=columns)


def test_a_request_may_be_sent_at_no_seconds_and_have_all_tokens_that_a_column_holds(
    tmp_path: Path,
) -> None:
    trace = read(tmp_path / "a.csv", "sent,in,out\n0,2147483647,3\n", columns=OWN)
    assert trace.arrival_s.tolist() == [0.0]
    assert trace.prompt_tokens.tolist() == [2147483647]


@pytest.mark.parametrize(
    ("latest", "rate_scale", "said"),
    [
        ("99999999999", 1.0, None),
        ("100000000000", 1.0, "like milliseconds .* by 1,000, or set rate_scale = 1000."),
        ("100000000000", 99.0, "like milliseconds"),
        ("100000000000", 100.0, None),
        ("100000000000000", 1.0, "like microseconds .* by 1,000,000, or set rate_scale = 1000000."),
        (
            "100000000000000000",
            1.0,
            "like nanoseconds .* by 1,000,000,000, and write the file anew",
        ),
    ],
)
def test_times_that_seconds_would_reach_in_three_thousand_years_are_doubted(
    tmp_path: Path, latest: str, rate_scale: float, said: str | None
) -> None:
    """Unless they are compressed by nearly as much; of BurstGPT's format they are as of any."""
    text = BURSTGPT_TEXT.splitlines()[0] + f"\n{latest},a,1,1,2,b\n"
    (tmp_path / "a.csv").write_text(text)
    settings = TraceSettings(file="a.csv", rate_scale=rate_scale)
    doubt = doubtful_times(settings, tmp_path)
    assert doubt is None if said is None else re.search(said, doubt or "")


def test_columns_may_rename_those_of_a_known_format(tmp_path: Path) -> None:
    """Named columns win over what the header looks like."""
    columns = {"arrival": "Timestamp", "prompt": "Total tokens", "output": "Response tokens"}
    trace = read(tmp_path / "a.csv", BURSTGPT_TEXT, columns=columns)
    assert (trace.format, trace.prompt_tokens.tolist()) == ("csv", [490, 693])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sent,in\n1,2\n",
            "line 1: The header names sent, in, and lacks out; it must name sent, in, out.",
        ),
        ("Sent,IN,out\n1,2,3\n", "Did you mean 'Sent', 'IN'. Upper and lower case differ"),
        ("send,in,out\n1,2,3\n", "lacks sent; .* Did you mean 'send'"),
        (
            "x;sent;in;out\n1;2;3;4\n",
            "line 1: The header 'x;sent;in;out' is one column, since ';' stands where commas are",
        ),
        ("sent;in;out\n0,5;3;4\n", "line 1: The header 'sent;in;out' is one column"),
        ("sent\tin\tout\n1\t2\t3\n", r"one column, since '\\t' stands where commas are"),
        (",".join(f"c{n}" for n in range(20)) + "\n", "names c0, c1, .*, c11, 8 more, and lacks"),
        ("sent,in,out\n1,2,3\n2,,3\n", "line 3: in is an empty cell; the column must hold whole"),
        ("sent,in,out\n1, ,3\n", "line 2: in is an empty cell"),
        (
            "sent,in,out,who\n1,2,3,x\n2,2,3,café\n".encode("latin-1"),
            "line 3: The line holds the byte 0xe9, which is no UTF-8; the file must be text in",
        ),
        ("sent,in,out\n", "The trace holds no request"),
        (
            "sent,in,out\n1,2,3\nsoon,2,3\n",
            "line 3: sent is 'soon'; the column must hold seconds",
        ),
        ("sent,in,out\n,2,3\n", "line 2: sent is an empty cell; the column must hold seconds"),
        ("sent,in,out\n-4,2,3\n", "line 2: sent is '-4'; the column must hold seconds of at"),
        (
            "sent,in,out\n1e-5,2,3\n2024-01-01 00:00:00,2,3\n",
            "line 3: sent is '2024-01-01 00:00:00'",
        ),
        ("sent,in,out\n2024-01-01 00:00:00,2,3\n5,2,3\n", "line 3: sent is '5'; .* times such as"),
        ("sent,in,out\n2024-01-01 00:00:00+25:00,2,3\n", "must hold times such as 2023-11-16"),
        (
            "sent,in,out\n2024-01-01 00:00:00,2,3\n2024-01-01 00:00:01+02:00,2,3\n",
            r"line 3: sent is '.*1\+02:00' here, but '.*0' in line 2; '.*1\+02:00' has an "
            "offset from UTC and '.*0' has none: give all times with an offset, or all without",
        ),
        (
            "sent,in,out\n2024-01-01 00:00:00Z,2,3\n2024-01-01 00:00:01,2,3\n",
            "line 3: .*0Z' has an offset from UTC and '.*1' has none",
        ),
        ("sent,in,out\n1,2.5,3\n", "line 2: in is '2.5'; the column must hold whole numbers"),
        ("sent,in,out\n1,0,3\n", "line 2: The request has 0 prompt tokens"),
        ("sent,in,out\n2,5,3\n1,5,3\n", "line 3: The timestamp lies 1 s before"),
        ("sent,in,out\n1,x,3\n2,y,3\n", "line 2: in is 'x'"),
        ("a;b,sent,in\n1,2,3\n", "names a;b, sent, in, and lacks out"),
        (",".join(f"c{n}" for n in range(12)) + "\n", "c10, c11, and lacks"),
        ("sent,in,outs\n1,2,3\n", "lacks out; .* Did you mean 'outs'"),
        ("out,ins,sent\n1,2,3\n", "lacks in; .* Did you mean 'ins'"),
        ('sent,in,out,who\n1,2,3,"x, y"\n1,2,3,4,5\n', "line 3: The line '1,2,3,4,5' is mal.*; 4"),
        ('sent,in,out,who\n1,2,3,"x\n2,3,4,5\n', "line 2: The line '1,2,3,\"x' is malformed"),
        (
            "sent,in,out\n1,2,2147483648\n",
            "has 2147483648 output tokens; allowed are 1 to 21474836",
        ),
        ("sent,in,out\n1,2,-3\n", "line 2: The request has -3 output tokens"),
        ("sent,in,out,in\n1,2,3,4\n", "line 1: The header names in twice"),
        ("\n\nsent,in,out,in\n1,2,3,4\n", "line 3: The header names in twice"),
        ("\n\nsent,in\n1,2\n", "line 3: The header names sent, in, and lacks out"),
        ("\n  \nsent,in,out\n1,2,3\n1,x,3\n", "line 5: in is 'x'"),
        ("\n\nsent,in,out\n1,2,3,4\n", "line 4: The line '1,2,3,4' is malformed; 3 comma"),
        ("sent,in,out\n1,2,3\n".encode("utf-16"), "line 1: .* the byte 0xff, which is no UTF-8"),
        ('{"sent": 1}\n', "The trace was named csv .* but its content looks like mooncake"),
        (b"PAR1xxxxxxxx", "a.csv"),
    ],
)
def test_a_flaw_of_a_csv_of_ones_own_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.csv", text, columns=OWN)


def test_whole_numbers_of_tokens_may_be_written_as_floats(tmp_path: Path) -> None:
    """In CSV, JSON lines and Parquet; 2.5, and what a float does not hold exactly, are none."""
    text = "sent,in,out\n1,812.0,3\n2,1e3,4.0\n"
    assert read(tmp_path / "a.csv", text, columns=OWN).prompt_tokens.tolist() == [812, 1000]
    assert read(tmp_path / "m.jsonl", MOONCAKE_TEXT.replace("316", "316.0")).output_tokens[3] == 316
    frame = pl.DataFrame({"sent": [1.0], "in": [812.0], "out": [3.0]})
    frame.write_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", columns=OWN).prompt_tokens.tolist() == [812]
    for wrong in ("2.5", "1e16", "nan", "inf"):
        with pytest.raises(InputError, match=f"in is '{wrong}'; the column must hold whole"):
            read(tmp_path / "a.csv", f"sent,in,out\n1,{wrong},3\n", columns=OWN)


DIRTY = """sent,in,out
,1,9
1,2,9
2,x,
3,-5,9
4,4,0
5,5,
,,
6,6,2147483648
7,7,-1
8,8,9
"""


def test_the_first_row_that_cannot_be_used_is_refused_with_the_number_of_all(
    tmp_path: Path,
) -> None:
    """A row counts once, to the first thing wrong with it; the option that skips them is named."""
    told = (
        r"line 2: sent is an empty cell; the column must hold seconds .*\. 7 of 10 rows cannot be "
        r"used \(empty time: 2, unreadable prompt: 1, empty output: 1, prompt below 1 token: 1, "
        r"output below 1 token: 1, output above 2147483647 tokens: 1\); "
        r"workload\.trace\.skip_bad_rows = true leaves them out\.$"
    )
    with pytest.raises(InputError, match=told):
        read(tmp_path / "a.csv", DIRTY, columns=OWN)
    for text, told in (
        ("sent,in,out\n1,x,3\n2,2,3\n", r"1 of 2 rows cannot be used; .* leaves it out\.$"),
        ("sent,in,out\n1,x,3\n2,y,3\n", r"None of the 2 rows can be used\.$"),
        ("sent,in,out\n1,x,3\n", r"whole numbers of tokens\.$"),
        (
            "sent,in,out\n2024-13-01 00:00:00,2,3\n2024-13-01 00:00:00Z,2,3\n",
            r"line 2: sent is '2024-13-01 00:00:00'; .* None of the 2 rows can be used\.$",
        ),
    ):
        with pytest.raises(InputError, match=told):
            read(tmp_path / "a.csv", text, columns=OWN)


def test_rows_that_cannot_be_used_are_left_out_and_counted_where_one_asks_for_it(
    tmp_path: Path,
) -> None:
    """Rows without an output are counted beside them, as without the option."""
    trace = read(tmp_path / "a.csv", DIRTY, columns=OWN, skip_bad_rows=True)
    assert trace.arrival_s.tolist() == [0.0, 7.0]
    assert trace.prompt_tokens.tolist() == [2, 8]
    assert trace.num_dropped == 1
    assert trace.skipped == {
        "empty time": 2,
        "unreadable prompt": 1,
        "empty output": 1,
        "prompt below 1 token": 1,
        "output below 1 token": 1,
        "output above 2147483647 tokens": 1,
    }
    table = {"trace": {"file": "a.csv", "columns": OWN, "skip_bad_rows": True}}
    requests = generate(WorkloadSettings.model_validate(table), 1, tmp_path, ("prose",))
    assert requests.left_out == {"num_dropped": 1, "skipped_rows": trace.skipped}
    with pytest.raises(InputError, match=r"no request \(1 rows .*; .* unreadable prompt: 1\); one"):
        text = "sent,in,out\n1,x,3\n2,2,0\n"
        read(tmp_path / "a.csv", text, columns=OWN, skip_bad_rows=True)


def test_lines_of_json_that_cannot_be_used_are_left_out_too(tmp_path: Path) -> None:
    text = MOONCAKE_TEXT.replace("316", '"?"').replace('{"timestamp": 3000, "input_length": 9', "9")
    with pytest.raises(InputError, match=r"line 5: .*2 of 5 rows .*\(unreadable line: 2\); work"):
        read(tmp_path / "m.jsonl", text)
    trace = read(tmp_path / "m.jsonl", text, skip_bad_rows=True)
    assert trace.prompt_tokens.tolist() == [6758, 7322, 7236]
    assert trace.skipped == {"unreadable line": 2}


def test_times_that_cannot_be_read_do_not_tell_how_time_is_given(tmp_path: Path) -> None:
    """Nor whether times have an offset."""
    text = "sent,in,out\nn/a,1,3\n2024-01-01 00:00:00Z,2,3\nlater,3,4\n2024-01-01 00:00:05Z,4,3\n"
    trace = read(tmp_path / "a.csv", text, columns=OWN, skip_bad_rows=True)
    assert trace.arrival_s.tolist() == [0.0, 5.0]
    assert trace.skipped == {"unreadable time": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "csv"}, "A trace of format csv needs columns = { arrival = "),
        ({"format": "azure", "columns": OWN}, "given for a trace of format azure, which has names"),
        ({"format": "burstgpt", "columns": OWN}, "given for a trace of format burstgpt"),
        ({"columns": {**OWN, "output": "in"}}, "must be three columns"),
        ({"columns": {"arrival": "sent"}}, "prompt"),
        ({"columns": {**OWN, "prompt": ""}}, "at least 1 character"),
    ],
)
def test_columns_that_name_no_csv_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TraceSettings(file="a.csv", **keys)


def test_mooncake_times_are_spread_unless_told_otherwise(tmp_path: Path) -> None:
    """Three requests stamped 0 and two stamped 3 s share the 3 s each; blank lines are skipped."""
    trace = read(tmp_path / "m.jsonl", MOONCAKE_TEXT)
    assert trace.format == "mooncake"
    assert trace.arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0, 4.5]
    assert trace.prompt_tokens.tolist() == [6758, 7322, 7236, 2287, 9013]
    assert trace.output_tokens.tolist() == [500, 490, 794, 316, 3]
    assert len(read(tmp_path / "m.jsonl", b"\xef\xbb\xbf" + MOONCAKE_TEXT.encode())) == 5
    plain = read(tmp_path / "m.jsonl", spread=False)
    assert plain.arrival_s.tolist() == [0.0, 0.0, 0.0, 3.0, 3.0]


def test_spreading_keeps_order_and_distinct_times() -> None:
    """Distinct times stay, equal ones never reach the next, and one time only stays."""
    times = np.array([0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0, 6.0])
    spread = spread_equal(times)
    assert np.all(np.diff(spread) > 0)
    assert spread[[0, 2, 3, 7]].tolist() == [0.0, 1.0, 5.0, 6.0]
    assert spread_equal(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert spread_equal(np.array([0.0, 1.0, 4.0, 4.0])).tolist() == [0.0, 1.0, 4.0, 5.5]


def test_other_formats_can_be_spread_on_request(tmp_path: Path) -> None:
    """Whole seconds of a CSV are spread when asked, and only then."""
    text = BURSTGPT_TEXT.replace("118.5", "5").replace("45,", "5,") + "9,GPT-4,1,1,2,API log\n"
    assert read(tmp_path / "b.csv", text).arrival_s.tolist() == [0.0, 0.0, 4.0]
    assert read(tmp_path / "b.csv", spread=True).arrival_s.tolist() == [0.0, 2.0, 4.0]


def steps(path: Path, times_s: list[float]) -> Path:
    """A trace with arrivals at the given seconds and prompts 1, 2, 3, ..."""
    rows = [
        json.dumps({"timestamp": 1000 * at, "input_length": i, "output_length": 1})
        for i, at in enumerate(times_s, 1)
    ]
    path.write_text("\n".join(rows))
    return path


def test_a_window_counts_from_its_start(tmp_path: Path) -> None:
    """The start is in, the end is out, and times begin at the start."""
    path = steps(tmp_path / "m.jsonl", [0, 1, 2, 4, 8])
    cut = read(path, start_s=1.0, end_s=8.0)
    assert cut.prompt_tokens.tolist() == [2, 3, 4]
    assert cut.arrival_s.tolist() == [0.0, 1.0, 3.0]
    assert read(path, start_s=3.0).arrival_s.tolist() == [1.0, 5.0]


def test_rate_scale_compresses_time(tmp_path: Path) -> None:
    """A scale of 4 gives the same requests in a quarter of the time."""
    path = steps(tmp_path / "m.jsonl", [0, 1, 2, 4, 8])
    assert read(path, rate_scale=4.0).arrival_s.tolist() == [0, 0.25, 0.5, 1, 2]
    assert read(path, rate_scale=3.0, end_s=2.0).arrival_s.tolist() == [0, 0.333333333]


def test_lengths_of_a_trace_are_scaled_to_whole_tokens_of_at_least_one(tmp_path: Path) -> None:
    """Prompts and outputs apart, arrivals as they are, whichever arrivals take the lengths."""
    text = "sent,in,out\n0,10,1\n1,3,200\n"
    twice = read(tmp_path / "a.csv", text, columns=OWN, prompt_scale=2.0, output_scale=0.01)
    assert twice.prompt_tokens.tolist() == [20, 6]
    assert twice.output_tokens.tolist() == [1, 2]
    assert twice.prompt_tokens.dtype == twice.output_tokens.dtype == np.int32
    assert twice.arrival_s.tolist() == [0.0, 1.0]
    table = {
        "num_requests": 3,
        "arrivals": {"kind": "constant", "rate_per_s": 1.0},
        "trace": {"file": "a.csv", "columns": OWN, "prompt_scale": 1.5},
    }
    drawn = generate(WorkloadSettings.model_validate(table), 1, tmp_path, ("prose",))
    assert drawn.prompt_tokens.tolist() == [15, 4, 15]
    assert drawn.output_tokens.tolist() == [1, 200, 1]


def test_lengths_scaled_beyond_what_a_column_holds_are_refused(tmp_path: Path) -> None:
    text = "sent,in,out\n0,5000,1\n"
    with pytest.raises(InputError, match=r"5,000 tokens, 5,000,000,000 with prompt_scale = 1e\+06"):
        read(tmp_path / "a.csv", text, columns=OWN, prompt_scale=1e6)
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.000001"):
        TraceSettings(file="a.csv", output_scale=0.0)


def test_repetition_is_back_to_back(tmp_path: Path) -> None:
    """A copy takes the window's length, or the trace and one mean interval, scaled alike."""
    path = steps(tmp_path / "m.jsonl", [0, 1, 2, 4, 8])
    twice = read(path, repeat=2)
    assert twice.arrival_s.tolist() == [0, 1, 2, 4, 8, 10, 11, 12, 14, 18]
    assert twice.prompt_tokens.tolist() == [1, 2, 3, 4, 5] * 2
    late = read(path, start_s=0.5, repeat=2)
    assert late.arrival_s[4] - late.arrival_s[0] == pytest.approx(7.5 + 7 / 3)
    window = read(path, start_s=1.0, end_s=5.0, repeat=2, rate_scale=2.0)
    assert window.arrival_s.tolist() == [0, 0.5, 1.5, 2, 2.5, 3.5]


@pytest.mark.parametrize(
    ("keys", "late"),
    [({"rate_scale": 1e-6}, 2), ({"repeat": 3}, 3), ({"repeat": 3, "max_requests": 5}, 3)],
)
def test_arrivals_beyond_a_thousand_million_seconds_are_refused(
    tmp_path: Path, keys: dict[str, Any], late: int
) -> None:
    """Stretched or repeated, the first late request is named; a cut before it is enough."""
    times: list[float] = [0, 1, 2000] if "rate_scale" in keys else [0, 5e8]
    path = steps(tmp_path / "m.jsonl", times)
    with pytest.raises(InputError, match=rf"Request {late} .*at most 1e\+09 s") as caught:
        read(path, **keys)
    assert caught.value.where == str(path)
    assert read(path, **{**keys, "max_requests": 2}).arrival_s[-1] <= 1e9


def test_times_up_to_the_bound_after_scaling_are_read(tmp_path: Path) -> None:
    """A trace whose times only the rate scale brings under the bound is fine."""
    path = steps(tmp_path / "m.jsonl", [0, 2e9])
    assert read(path, rate_scale=2.0).arrival_s.tolist() == [0.0, 1e9]
    with pytest.raises(InputError, match=r"lies 2e\+09 s after the first") as caught:
        read(path)
    assert caught.value.where == f"{path}, line 2"
    with pytest.raises(InputError, match=r"lies 2e\+09 s after the first") as caught:
        read(steps(path, [0, 2e9, 5]), sort=True)
    assert caught.value.where == f"{path}, line 2"


def test_a_window_of_no_length_is_refused() -> None:
    with pytest.raises(ValidationError, match="ends at 5 s but starts at 5 s; end_s must be great"):
        TraceSettings(file="a.csv", start_s=5.0, end_s=5.0)


def test_a_tiny_rate_scale_is_refused() -> None:
    """The bound is named."""
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.000001"):
        TraceSettings(file="a.csv", rate_scale=1e-300)


def test_max_requests_keeps_the_first(tmp_path: Path) -> None:
    """The cut comes last, after repetition."""
    path = steps(tmp_path / "m.jsonl", [0, 1, 2])
    assert read(path, repeat=3, max_requests=4).prompt_tokens.tolist() == [1, 2, 3, 1]
    assert len(read(path, max_requests=99)) == 3


def test_an_unsorted_trace_is_refused_with_its_line_or_sorted(tmp_path: Path) -> None:
    """The message says where and how to sort; sorting keeps equal times in the file's order."""
    path = steps(tmp_path / "m.jsonl", [0, 5, 2, 2])
    with pytest.raises(InputError, match=r"3 s before the one.*set sort = true") as caught:
        read(path)
    assert caught.value.where == f"{path}, line 3"
    ordered = read(path, sort=True, spread=False)
    assert ordered.arrival_s.tolist() == [0.0, 2.0, 2.0, 5.0]
    assert ordered.prompt_tokens.tolist() == [1, 3, 4, 2]
    many = read(steps(path, [1, 0] * 100), sort=True, spread=False)
    assert many.prompt_tokens.tolist() == [*range(2, 201, 2), *range(1, 200, 2)]


def wider(text: str, name: str) -> str:
    """CSV text with one column more."""
    head, *rows = text.splitlines()
    return "\n".join([f"{head},{name}", *(f"{row},more" for row in rows)])


def spoilt(data: bytes) -> bytes:
    """The same bytes but for the first behind gzip's header, which say how it was compressed."""
    return data[:10] + b"\xff" + data[11:]


BAD_FILES = [
    ("empty.csv", "", "trace file is empty", None),
    ("blank.csv", "\n\n", "trace file is empty", None),
    ("head.csv", AZURE_TEXT.splitlines()[0] + "\n", "holds no request", None),
    (
        "failed.csv",
        BURSTGPT_TEXT.splitlines()[0] + "\n1,a,1,0,1,b",
        "1 rows have",
        None,
    ),
    ("what.csv", "when,in,out\n1,2,3\n", "format is unknown; allowed are: mooncake .*helios", None),
    ("time.csv", AZURE_TEXT.replace("2023-11-16 18:15:50.9951690", "noon"), "is 'noon'", 3),
    (
        "token.csv",
        AZURE_TEXT.replace("396", "39.6"),
        "ContextTokens is '39.6'; the column must hold",
        3,
    ),
    ("none.csv", AZURE_TEXT.replace(",109", ","), "GeneratedTokens is an empty cell", 3),
    ("zero.csv", AZURE_TEXT.replace("879", "0"), "has 0 prompt tokens; allowed are 1 to", 4),
    ("less.csv", AZURE_TEXT.replace("109", "-9"), "has -9 output tokens; allowed are 1 to", 3),
    ("big.csv", AZURE_TEXT.replace("396", "3000000000"), "has 3000000000 prompt tokens", 3),
    ("wide.csv", AZURE_TEXT.replace("109", "109,7"), "is malformed; 3 comma-separated", 3),
    ("short.csv", AZURE_TEXT.replace(",396,109", ""), "ContextTokens is an empty cell", 3),
    ("blank2.csv", AZURE_TEXT.replace("2023-11-16 18:15:51,879", "\n\nx,1"), "is 'x'", 6),
    ("latin.csv", AZURE_TEXT.encode().replace(b"396", b"\xff"), "0xff, which is no UTF-8", 3),
    (
        "commas.csv",
        AZURE_TEXT.replace("\n2023-11-16 18:15:51", "\n\n,,\n2023"),
        "TIMESTAMP is an em",
        5,
    ),
    ("lastcommas.csv", AZURE_TEXT + ",,\n", "TIMESTAMP is an empty cell; .* 1 of 4 rows", 5),
    ("past.csv", BURSTGPT_TEXT.replace("\n5,", "\n-5,"), "Timestamp is '-5'; .*at least 0", 2),
    ("far.csv", BURSTGPT_TEXT.replace("118.5", "1e308"), "lies 1e.308 s after .*up to 1e.09 s", 4),
    ("column.csv", AZURE_TEXT.replace("GeneratedTokens", "Out"), "lacks GeneratedTokens", 1),
    ("again.csv", wider(AZURE_TEXT, "TIMESTAMP"), "header names TIMESTAMP twice", 1),
    ("spaced.csv", wider(AZURE_TEXT, " TIMESTAMP"), "header names TIMESTAMP twice", 1),
    (
        "inf.csv",
        BURSTGPT_TEXT.replace("118.5", "inf"),
        "Timestamp is 'inf'; the column must hold",
        4,
    ),
    ("cut.jsonl", MOONCAKE_TEXT.replace("316,", ""), "is no JSON object", 5),
    (
        "key.jsonl",
        MOONCAKE_TEXT.replace('"input_length": 7236', '"in": 1'),
        "input_length is No",
        3,
    ),
    ("type.jsonl", MOONCAKE_TEXT.replace("316", "31.5"), "output_length is 31.5; it must be a", 5),
    ("bool.jsonl", MOONCAKE_TEXT.replace("316", "true"), "output_length is True", 5),
    ("nan.jsonl", MOONCAKE_TEXT.replace("3000", "NaN"), "timestamp is nan; it must be a fin", 5),
    ("huge.jsonl", MOONCAKE_TEXT.replace("316", "9" * 400), "it must be a whole number", 5),
    ("deep.jsonl", MOONCAKE_TEXT + '{"a":' + "[" * 100_000, "is no JSON object", 7),
    ("list.jsonl", MOONCAKE_TEXT + "[1]\n", "timestamp is None", 7),
    ("spoilt.csv.gz", spoilt(gzip.compress(AZURE_TEXT.encode())), "not whole gzip data", None),
    ("torn.csv.gz", gzip.compress(AZURE_TEXT.encode())[:-9], "not whole gzip data", None),
    ("torn.parquet", b"PAR1 and no more", "not whole Parquet data", None),
]


@pytest.mark.parametrize(("name", "content", "message", "line"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str, line: int | None
) -> None:
    """One sentence with the file, the line where there is one, and what is allowed."""
    path = tmp_path / name
    with pytest.raises(InputError, match=message) as caught:
        read(path, content)
    assert caught.value.where == (str(path) if line is None else f"{path}, line {line}")


def test_a_missing_file_or_unclear_folder_is_named(tmp_path: Path) -> None:
    """The full path stands in the error."""
    with pytest.raises(InputError, match="does not exist") as caught:
        read(tmp_path / "absent.csv")
    assert caught.value.where == str(tmp_path / "absent.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder with 0 files \*_trace\.parquet"):
        read(tmp_path / "folder")
    for name in ("one", "two"):
        (tmp_path / "folder" / f"{name}_trace.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"folder with 2 files \*_trace\.parquet"):
        read(tmp_path / "folder")


def test_a_wrongly_named_format_says_what_the_file_looks_like(tmp_path: Path) -> None:
    """A named format is checked against the content."""
    with pytest.raises(InputError, match=r"named burstgpt .* looks like azure; allowed are"):
        read(tmp_path / "a.csv", AZURE_TEXT, format="burstgpt")
    assert read(tmp_path / "a.csv", format="azure").format == "azure"
    with pytest.raises(InputError, match="is of no known format"):
        read(tmp_path / "b.csv", "a,b\n1,2\n", format="azure")


def test_an_empty_window_tells_the_span(tmp_path: Path) -> None:
    """A window beyond the trace is an error with the trace's reach."""
    path = steps(tmp_path / "m.jsonl", [0, 1, 8])
    with pytest.raises(InputError, match="from 9 s to its end; the trace reaches from 0 s to 8 s"):
        read(path, start_s=9.0)


def test_a_trace_of_one_instant_needs_an_end_to_repeat(tmp_path: Path) -> None:
    """Nothing tells the interval between copies; end_s does."""
    path = steps(tmp_path / "m.jsonl", [0])
    with pytest.raises(InputError, match=r"arrive at once.*give end_s"):
        read(path, repeat=2)
    assert read(path, repeat=2, end_s=5.0).arrival_s.tolist() == [0.0, 5.0]


def test_too_many_repetitions_are_refused(tmp_path: Path) -> None:
    """Before memory is taken for them."""
    with pytest.raises(InputError, match="repeated 100000 times exceed"):
        read(AZURE / "AzureLLMInferenceTrace_conv.csv.gz", repeat=100_000)


def run_file(folder: Path, **changes: Any) -> Path:
    """The requests of a run of ours, three of them, out of order by arrival."""
    columns: dict[str, Any] = {
        "request_id": [0, 1, 2],
        "arrival_s": [0.1 + 0.2, 9.75, 1.0 / 3.0],
        "prompt_tokens": [11, 22, 33],
        "output_tokens": [4, 5, 6],
        "domain": ["code", "prose", "code"],
        "trace_start": [77, 0, 1234],
        **changes,
    }
    assert set(columns) <= set(REQUEST_COLUMNS)
    folder.mkdir(exist_ok=True)
    pl.DataFrame(columns).write_parquet(folder / "requests.parquet")
    return folder


def test_a_run_is_replayed_exactly(tmp_path: Path) -> None:
    """Arrivals to the last bit, lengths, domains and trace places, sorted by arrival."""
    run = run_file(tmp_path / "run")
    table = {"trace": {"file": "run"}}
    requests = generate(
        WorkloadSettings.model_validate(table), 5, tmp_path, ("prose", "code", "other")
    )
    assert requests.arrival_s.tolist() == [0.1 + 0.2, 1.0 / 3.0, 9.75]
    assert requests.prompt_tokens.tolist() == [11, 33, 22]
    assert requests.output_tokens.tolist() == [4, 6, 5]
    assert [requests.domains[i] for i in requests.domain] == ["code", "code", "prose"]
    assert requests.trace_start.tolist() == [77, 1234, 0]
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "domain", "trace_start"):
        column = getattr(requests, name)
        assert column.flags.c_contiguous and column.flags.writeable, name
    by_file = read(run / "requests.parquet")
    assert by_file.format == "helios"


def test_domains_and_places_go_with_the_requests_of_a_window(tmp_path: Path) -> None:
    """The first request of three, in order of arrival, lies before it; the others come twice."""
    trace = read(run_file(tmp_path / "run"), start_s=0.31, end_s=10.0, repeat=2)
    assert trace.domain is not None and trace.trace_start is not None
    assert [trace.domains[i] for i in trace.domain] == ["code", "prose"] * 2
    assert trace.trace_start.tolist() == [1234, 0] * 2


def test_only_a_file_of_distributions_is_drawn(tmp_path: Path) -> None:
    for folder, drawn in ((servegen(tmp_path / "sg"), True), (run_file(tmp_path / "run"), False)):
        assert is_drawn(TraceSettings(file=folder.name), tmp_path) is drawn


def test_a_replayed_run_can_be_given_other_domains(tmp_path: Path) -> None:
    """Domains of the scenario take the place of the run's; an unknown one of the run is named."""
    run_file(tmp_path / "run")
    table = {"trace": {"file": "run"}, "domains": [{"name": "other", "share": 1}]}
    requests = generate(WorkloadSettings.model_validate(table), 5, tmp_path, ("other",))
    assert requests.domains == ("other",)
    assert requests.domain.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"domain 'code' is unknown\. The profile has other"):
        generate(
            WorkloadSettings.model_validate({"trace": {"file": "run"}}), 5, tmp_path, ("other",)
        )


def test_generated_requests_survive_a_trip_through_a_run(tmp_path: Path) -> None:
    """Writing a workload's columns as a run and replaying them gives the same bytes."""
    table: dict[str, Any] = {
        "arrivals": {"kind": "gamma", "rate_per_s": 7.0, "cv": 2.0},
        "num_requests": 2000,
        "prompt": {"kind": "geometric", "mean_tokens": 90},
        "output": {"kind": "geometric", "mean_tokens": 90},
        "domains": [{"name": "prose", "share": 1}, {"name": "code", "share": 1}],
    }
    first = generate(WorkloadSettings.model_validate(table), 5, tmp_path, ("prose", "code"))
    run_file(
        tmp_path / "run",
        request_id=np.arange(2000),
        arrival_s=first.arrival_s,
        prompt_tokens=first.prompt_tokens,
        output_tokens=first.output_tokens,
        domain=[first.domains[i] for i in first.domain],
        trace_start=first.trace_start,
    )
    again = generate(
        WorkloadSettings.model_validate({"trace": {"file": "run"}}),
        6,
        tmp_path,
        ("prose", "code"),
    )
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "trace_start"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name
    assert [first.domains[i] for i in first.domain] == [again.domains[i] for i in again.domain]


def test_requests_of_a_run_that_arrive_at_once_keep_their_numbers_order(tmp_path: Path) -> None:
    run = run_file(tmp_path / "run", request_id=[2, 0, 1], arrival_s=[0.0, 0.0, 0.0])
    assert read(run).prompt_tokens.tolist() == [22, 33, 11]


def test_requests_of_a_run_that_never_arrived_are_left_out(tmp_path: Path) -> None:
    """A closed loop that was cut short has rows without an arrival; they are counted."""
    run = run_file(tmp_path / "run", arrival_s=[0.5, None, 0.25])
    trace = read(run)
    assert trace.prompt_tokens.tolist() == [33, 11]
    assert trace.num_dropped == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_tokens": [4, 0, 6]}, "request_id 1: .*'output_tokens': 0.*token counts 1 to"),
        ({"trace_start": [77, 0, -1]}, "request_id 2: .*'trace_start': -1.*trace start 0 to"),
        ({"arrival_s": [0.1, -1.0, 2.0]}, "'arrival_s': -1.0"),
        ({"domain": ["code", None, "code"]}, "'domain': None"),
        (
            {"arrival_s": ["a", "b", "c"]},
            "column arrival_s has the type String; it must hold numbers",
        ),
        (
            {"prompt_tokens": ["1", "2", "3"]},
            "prompt_tokens has the type String; it must hold whole numbers",
        ),
        (
            {"trace_start": [0.5, 1.0, 2.0]},
            "trace_start has the type Float64; it must hold whole numbers",
        ),
        ({"domain": [1, 2, 3]}, "column domain has the type Int64; it must hold text"),
        ({"arrival_s": [0.1, 1e308, 2.0]}, "'arrival_s': 1e.308.*arrival must be 0 to 1e.09 s"),
        ({"arrival_s": [None, None, None]}, "holds no request"),
    ],
)
def test_a_spoilt_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The row or column is shown with what is allowed, in one line."""
    with pytest.raises(InputError, match=message) as caught:
        read(run_file(tmp_path / "run", **changes))
    assert len(str(caught.value).splitlines()) == 1


def servegen(folder: Path, trace: dict[str, Any] | None = None, **lengths: Any) -> Path:
    """Two clients over two windows of 600 s with lengths that change between the windows."""
    folder.mkdir(exist_ok=True)
    windows = {
        "client_id": [0, 0, 1, 1],
        "window_start_s": [0, 600, 0, 600],
        "rate_rps": [2.0, 5.0, 0.0, 3.0],
        "cv": [2.0, 1.0, 0.0, 2.0],
        "pattern": ["Gamma", "Gamma", "", "Weibull"],
        "arg1": [0.25, 1.0, 0.0, 0.5427],
        "arg2": [2.0, 0.2, 0.0, 0.2],
        **(trace or {}),
    }
    rows = {
        "client_id": [0, 0, 0, 0, 0, 1, 1],
        "window_start_s": [0, 0, 0, 600, 600, 0, 0],
        "field": ["input_tokens"] * 2
        + ["output_tokens", "input_tokens", "output_tokens", "input_tokens", "output_tokens"],
        "value": [100.0, 200.0, 7.0, 300.0, 9.0, 50.0, 5.0],
        "prob": [0.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0],
        **lengths,
    }
    pl.DataFrame(windows).write_parquet(folder / "model_trace.parquet")
    pl.DataFrame(rows).with_columns(pl.col("field").cast(pl.Categorical)).write_parquet(
        folder / "model_dataset.parquet"
    )
    return folder


def test_servegen_clients_keep_their_rates_and_lengths(tmp_path: Path) -> None:
    """Counts within 6 standard deviations of the rates, each window with its own lengths."""
    trace = read(servegen(tmp_path / "sg"))
    assert trace.format == "servegen"
    assert np.all(np.diff(trace.arrival_s) >= 0)
    early = trace.arrival_s < 600
    assert set(trace.prompt_tokens[early].tolist()) == {100, 200}
    assert set(trace.output_tokens[early].tolist()) == {7}
    assert set(trace.prompt_tokens[~early].tolist()) == {300, 50}
    # A renewal process of CV c counts with variance c^2 x mean.
    assert abs(early.sum() - 1200) < 6 * 2 * np.sqrt(1200)
    assert abs(np.sum(trace.prompt_tokens == 300) - 3000) < 6 * np.sqrt(3000)
    assert abs(np.sum(trace.prompt_tokens == 50) - 1800) < 6 * 2 * np.sqrt(1800)
    assert np.mean(trace.prompt_tokens[early] == 200) == pytest.approx(0.75, abs=0.06)
    assert np.array_equal(trace.output_tokens == 5, trace.prompt_tokens == 50)


def test_servegen_intervals_vary_as_the_pattern_and_its_shape_say(tmp_path: Path) -> None:
    """A gamma of shape 0.25 has CV 2, and so has a Weibull of shape 0.5427, but not the other."""
    trace = read(servegen(tmp_path / "sg", {"rate_rps": [20.0, 0.0, 0.0, 20.0]}))
    for client, prompts in (("gamma", (100, 200)), ("weibull", (50,))):
        gaps = np.diff(trace.arrival_s[np.isin(trace.prompt_tokens, prompts)])
        assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.1), client


def test_windows_alike_of_a_servegen_client_hold_requests_of_their_own(tmp_path: Path) -> None:
    """The first request comes at another time, and lengths are drawn anew."""
    alike = {"rate_rps": [2.0, 2.0, 0.0, 0.0], "arg1": [0.25] * 4}
    lengths = {"window_start_s": [0] * 7}
    lengths["client_id"] = [0, 0, 0, 1, 1, 1, 1]
    trace = read(servegen(tmp_path / "sg", alike, **lengths))
    late = trace.arrival_s >= 600
    assert trace.arrival_s[late][0] - 600 != pytest.approx(trace.arrival_s[0], abs=1e-6)
    early, later = trace.prompt_tokens[~late][:50], trace.prompt_tokens[late][:50]
    assert not np.array_equal(early, later)


def test_servegen_probabilities_count_in_proportion_whatever_they_add_up_to(
    tmp_path: Path,
) -> None:
    usual, doubled = (
        read(servegen(tmp_path / name, prob=[0.25 * times, 0.75 * times, 1, 1, 1, 1, 1]))
        for name, times in (("usual", 1.0), ("doubled", 2.0))
    )
    assert np.array_equal(usual.prompt_tokens, doubled.prompt_tokens)


def test_servegen_lengths_are_whole_and_drawn_alike_in_whatever_order_they_stand(
    tmp_path: Path,
) -> None:
    """What is never drawn may stand there too."""
    plain = read(servegen(tmp_path / "plain", prob=[0.5, 0.5, 1, 1, 1, 1, 1]))
    value = [200.4, 99.6, 7, 300, 9, 50, 5]
    turned = read(servegen(tmp_path / "turned", value=value, prob=[0.5, 0.5, 1, 1, 1, 1, 1]))
    assert np.array_equal(plain.prompt_tokens, turned.prompt_tokens)
    never = read(servegen(tmp_path / "never", prob=[0, 1, 1, 1, 1, 1, 1]))
    assert set(never.prompt_tokens.tolist()) == {200, 300, 50}


def test_the_only_window_of_a_servegen_trace_lasts_ten_minutes(tmp_path: Path) -> None:
    trace = read(servegen(tmp_path / "sg", {"window_start_s": [0] * 4}))
    assert 590.0 < trace.arrival_s[-1] < 600.0


def test_a_servegen_window_is_the_same_whatever_else_is_read(tmp_path: Path) -> None:
    """Reading the second window alone gives what the whole day holds there; seeds differ."""
    path = servegen(tmp_path / "sg") / "model_trace.parquet"
    whole = read(path)
    late = whole.arrival_s >= 600
    window = read(path, start_s=600.0)
    assert np.allclose(window.arrival_s + 600, whole.arrival_s[late], rtol=0, atol=1e-9)
    assert np.array_equal(window.prompt_tokens, whole.prompt_tokens[late])
    within = read(path, start_s=300.5)
    assert np.allclose(within.arrival_s + 300.5, whole.arrival_s[whole.arrival_s >= 300.5])
    assert read(path).arrival_s.tobytes() == whole.arrival_s.tobytes()
    assert read(path, seed=2).arrival_s.tobytes() != whole.arrival_s.tobytes()


@pytest.mark.parametrize(
    ("trace", "lengths", "message"),
    [
        ({"pattern": ["Gamma", "Pareto", "", "Weibull"]}, {}, "pattern Gamma or Weibull"),
        ({"rate_rps": [2.0, -5.0, 0.0, 3.0]}, {}, "'rate_rps': -5.0"),
        ({"rate_rps": [2.0, 5.0, 0.0, 1e12]}, {}, r"model_trace\.parquet, row 3: .*up to 1e\+06"),
        ({"window_start_s": [0, 600, 0, 1000]}, {}, "at 0 s and at 600 s, .* the 400 s .*equally"),
        ({"window_start_s": [0, 600, 0, 10**10]}, {}, "row 3: .*the window 0 to 1e.09 s"),
        ({"arg1": [0.25, 0.0, 0.0, 1.0]}, {}, "shape arg1 of 0.0004 to 10000"),
        ({"arg1": [0.25, 1.0, 0.0, 1e-9]}, {}, "row 3: .*0.15 to 130 .Weibull"),
        (
            {"rate_rps": ["a", "b", "c", "d"]},
            {},
            "rate_rps has the type String; it must hold numbers",
        ),
        (
            {"client_id": [0.0, 0.0, 1.0, 1.0]},
            {},
            "client_id has the type Float64; it must hold whole numbers",
        ),
        ({"rate_rps": [0.0, 0.0, 0.0, 0.0]}, {}, "No request lies in the window"),
        ({}, {"value": [0.0] + [5.0] * 6}, "token count must be at least 1"),
        ({}, {"value": [1e12] + [5.0] * 6}, "at most 2147483647"),
        ({}, {"prob": [float("nan")] + [1.0] * 6}, "at least 0 and finite"),
        ({}, {"prob": [-0.5] + [1.0] * 6}, "probability at least 0"),
        ({}, {"prob": [0.0, 0.0] + [1.0] * 5}, "Client 0 .* has no distribution of input_tokens"),
        ({"client_id": [-1, 0, 1, 1]}, {}, "row 0: .*the client must be 0 or more"),
        ({}, {"window_start_s": [None] + [0] * 6}, "row 0 .*it needs a client and a window"),
        ({}, {"client_id": [0] * 6 + [None]}, "row 6 .*it needs a client and a window"),
        ({}, {"client_id": [0, 0, 0, 0, 0, 2, 2]}, "Client 1 sends requests at 600 s but has no"),
    ],
)
def test_a_spoilt_servegen_trace_is_refused(
    tmp_path: Path, trace: dict[str, Any], lengths: dict[str, Any], message: str
) -> None:
    """The row or client is named with what is allowed."""
    with pytest.raises(InputError, match=message):
        read(servegen(tmp_path / "sg", trace, **lengths))


def test_servegen_windows_of_too_many_requests_are_refused_before_sampling(tmp_path: Path) -> None:
    """The expected number and the setting are named; an earlier end is enough."""
    folder = servegen(tmp_path / "sg", {"rate_rps": [1e6, 5.0, 0.0, 3.0]})
    with pytest.raises(InputError, match=r"about 6e\+08 requests; at most 50000000.*trace\.end_s"):
        read(folder, max_requests=5)
    cut = read(folder, max_requests=5, end_s=0.01)
    assert len(cut) == 5


def test_an_end_inside_a_servegen_window_keeps_its_requests(tmp_path: Path) -> None:
    """What is drawn up to the end is what the whole window holds there."""
    path = servegen(tmp_path / "sg")
    whole, cut = read(path), read(path, end_s=700.5)
    num = int(np.searchsorted(whole.arrival_s, 700.5))
    assert cut.arrival_s.tobytes() == whole.arrival_s[:num].tobytes()
    assert cut.prompt_tokens.tobytes() == whole.prompt_tokens[:num].tobytes()
    assert cut.output_tokens.tobytes() == whole.output_tokens[:num].tobytes()


def test_servegen_needs_both_files_by_their_names(tmp_path: Path) -> None:
    """The lengths lie beside the trace under the same name."""
    folder = servegen(tmp_path / "sg")
    (folder / "model_dataset.parquet").unlink()
    with pytest.raises(InputError, match=r"needs them beside it") as caught:
        read(folder)
    assert caught.value.where == str(folder / "model_dataset.parquet")
    (folder / "model_trace.parquet").rename(folder / "model.parquet")
    with pytest.raises(InputError, match=r"must be named NAME_trace\.parquet"):
        read(folder / "model.parquet")


def test_a_parquet_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    """Of unknown columns it says what to do; known ones that are not all there are listed."""
    pl.DataFrame({"ts": [1], "in": [2]}).write_parquet(tmp_path / "a.parquet")
    for settings in ({}, {"format": "servegen"}):
        with pytest.raises(InputError, match=r"columns are in, ts\. Name those of arrivals"):
            read(tmp_path / "a.parquet", **settings)
    pl.DataFrame({"arrival_s": [1.0], "domain": ["x"]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="lacks the columns request_id, prompt_tokens"):
        read(tmp_path / "b.parquet")


OWN_COLUMNS = {"arrival": "ts", "prompt": "in", "output": "out"}


@pytest.mark.parametrize(
    "arrivals",
    [
        [3.5, 4.0, 5.25],
        [datetime(2026, 3, 1, 23, 59, 58, 500_000), datetime(2026, 3, 1, 23, 59, 59), None],
        [
            datetime(2026, 3, 29, 0, 59, 59, 500_000, UTC),
            datetime(2026, 3, 29, 1, 0, 0, 0, UTC),
            None,
        ],
    ],
    ids=["seconds", "naive times", "times of a zone whose clocks go forward"],
)
def test_a_parquet_file_of_ones_own_is_read_as_the_csv_of_the_same_table(
    arrivals: list[Any], tmp_path: Path
) -> None:
    if arrivals[2] is None:
        arrivals[2] = arrivals[1] + timedelta(seconds=1.25)
    frame = pl.DataFrame(
        {"user": ["a", "b", "c"], "ts": arrivals, "in": [5, 6, 7], "out": [1, 0, 2]}
    )
    if getattr(frame["ts"].dtype, "time_zone", None):
        frame = frame.with_columns(pl.col("ts").dt.convert_time_zone("Europe/Berlin"))
    frame.write_parquet(tmp_path / "own.parquet")
    found = read(tmp_path / "own.parquet", columns=OWN_COLUMNS)
    assert found.arrival_s.tolist() == [0.0, 1.75]
    assert found.prompt_tokens.tolist() == [5, 7]
    assert found.num_dropped == 1


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"ts": [1.0], "In": [2], "out": [3]}, r"names ts, In, out, and lacks in; .*'In'\?"),
        ({"ts": [1.0, 2.0], "in": [2, None], "out": [3, 4]}, "in is an empty cell"),
        ({"ts": [1.0], "in": [2.5], "out": [3]}, "in is '2.5'; .* whole numbers of tokens"),
        ({"ts": [[1.0]], "in": [2], "out": [3]}, "The columns cannot be read"),
    ],
)
def test_what_is_wrong_with_a_parquet_file_of_ones_own_is_said_as_of_a_csv(
    frame: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pl.DataFrame(frame).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(InputError, match=said):
        read(tmp_path / "own.parquet", columns=OWN_COLUMNS)
