"""Layouts of other tools: every row stands for its token, or the file is refused.

The fixtures are written by hand from what the tools' sources write; only the two
formats that are written here too have round trips.
"""

import json
import math
import os
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from array_record.python import array_record_module

from kdjax.teacher.importers import encodings
from kdjax.teacher.importers.convert import FORMATS, ImportedSequence

VOCAB_SIZE, K = 100, 3
INF = math.inf


def read(name, path, *, k=K, vocab_size=VOCAB_SIZE):
    return list(FORMATS[name].read(path, k=k, vocab_size=vocab_size))


def write_lines(path, *objects):
    path.write_text("".join(json.dumps(line) + "\n" for line in objects))
    return path


def assert_rows(rows, *, token_ids, ids, log_probs, targets):
    """Exact, with NaN equal to NaN, and of the declared types."""
    wanted = ImportedSequence(
        None if token_ids is None else np.asarray(token_ids, np.int32),
        np.asarray(ids, np.int32),
        np.asarray(log_probs, np.float32),
        np.asarray(targets, np.float32),
    )
    for name, found, value in zip(ImportedSequence._fields, rows, wanted, strict=True):
        if value is None:
            assert found is None
            continue
        assert found.dtype == value.dtype, name
        np.testing.assert_array_equal(found, value, err_msg=name)


def assert_refused(name, path, message, **options):
    """One line that names the file and says what was found."""
    with pytest.raises(ValueError, match=message) as error:
        read(name, path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def entries(*pairs):
    """Of vLLM: (id, log-probability, rank) each."""
    return {
        str(i): {"logprob": log_prob, "rank": rank, "decoded_token": "?"}
        for i, log_prob, rank in pairs
    }


VLLM = {
    "request_id": "0",
    "prompt_token_ids": [7, 9, 42],
    "prompt_logprobs": [
        None,
        entries((9, -0.5, 1), (8, -1.0, 2), (3, -2.0, 3)),  # k: the token is among them
        entries((42, -6.0, 57), (1, -0.25, 1), (2, -2.5, 2), (3, -4.0, 3)),  # k + 1
    ],
}
VLLM_ROWS = {
    "token_ids": [7, 9, 42],
    "ids": [[-1, -1, -1], [9, 8, 3], [1, 2, 3]],
    "log_probs": [[-INF] * 3, [-0.5, -1.0, -2.0], [-0.25, -2.5, -4.0]],
    "targets": [math.nan, -0.5, -6.0],
}


def test_vllm_dump_has_the_token_itself_beyond_the_top_k(tmp_path):
    (rows,) = read("vllm", write_lines(tmp_path / "a.jsonl", VLLM))
    assert_rows(rows, **VLLM_ROWS)


def test_vllm_answers_have_a_sequence_in_each_choice(tmp_path):
    second = {"prompt_logprobs": [None, entries((5, -0.125, 1))], "text": ""}
    first = {k: v for k, v in VLLM.items() if k != "request_id"}
    path = write_lines(tmp_path / "a.jsonl", {"choices": [first, second]})
    one, other = read("vllm", path)
    assert_rows(one, **VLLM_ROWS)
    assert_rows(
        other,
        token_ids=None,
        ids=[[-1] * 3, [5, -1, -1]],
        log_probs=[[-INF] * 3, [-0.125, -INF, -INF]],
        targets=[math.nan, math.nan],
    )


def test_vllm_chat_answer_has_them_beside_the_choices(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", VLLM | {"choices": [{"message": {}}]})
    (rows,) = read("vllm", path)
    assert_rows(rows, **VLLM_ROWS)


def test_vllm_without_token_ids_knows_the_tokens_beyond_the_top_k(tmp_path):
    answer = {"prompt_logprobs": VLLM["prompt_logprobs"]}
    (rows,) = read("vllm", write_lines(tmp_path / "a.jsonl", answer))
    assert_rows(
        rows, **VLLM_ROWS | {"token_ids": None, "targets": [math.nan, math.nan, -6.0]}
    )


def test_a_smaller_k_cuts_and_a_larger_one_leaves_slots_unused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", VLLM)
    (rows,) = read("vllm", path, k=1)
    np.testing.assert_array_equal(rows.ids, [[-1], [9], [1]])
    np.testing.assert_array_equal(rows.target_log_probs[1:], [-0.5, -6.0])
    (rows,) = read("vllm", path, k=60)  # the token of rank 57 is no 4th of the row
    np.testing.assert_array_equal((rows.ids >= 0).sum(1), [0, 3, 3])
    assert np.all(rows.log_probs[:, 3:] == -INF)


def test_vllm_tied_ranks_do_not_add_a_pair(tmp_path):
    tied = entries((9, -1.0, 2), (8, -0.5, 1), (3, -1.0, 2), (4, -2.0, 3))
    answer = {"prompt_token_ids": [7, 9], "prompt_logprobs": [None, tied]}
    (rows,) = read("vllm", write_lines(tmp_path / "a.jsonl", answer))
    np.testing.assert_array_equal(rows.ids[1], [8, 9, 3])


def test_vllm_minus_9999_is_minus_infinity(tmp_path):
    row = entries((9, -0.5, 1), (8, -9999.0, 2))
    answer = {"prompt_token_ids": [7, 8], "prompt_logprobs": [None, row]}
    (rows,) = read("vllm", write_lines(tmp_path / "a.jsonl", answer))
    np.testing.assert_array_equal(rows.ids[1], [9, -1, -1])
    assert rows.target_log_probs[1] == -INF


def vllm_row(row, token_ids=(7, 9)):
    return {"prompt_token_ids": list(token_ids), "prompt_logprobs": [None, row]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "?"}, "line 2: found .'text'.*needed prompt_logprobs, or choices"),
        ({"choices": []}, "line 2: found .*needed prompt_logprobs, or choices"),
        ({"choices": [{"text": "?"}]}, "line 2 choice 0: .*a list prompt_logprobs"),
        ({"choices": [3]}, "line 2 choice 0: found 3, needed a list prompt_logprobs"),
        ([1], "line 2: found 1, needed a JSON object"),
        ({"prompt_logprobs": [entries((1, -1.0, 1))]}, "token 0: found .*needed null"),
        (vllm_row(None), "line 2, token 1: found None, needed entries by token id"),
        (vllm_row({}), "token 1: found {}, needed entries"),
        (vllm_row({"x": {"logprob": -1.0, "rank": 1}}), "token 1: found {'x'"),
        (vllm_row({"9": {"logprob": None, "rank": 1}}), "token 1: .*numbers logprob"),
        (vllm_row({"9": {"logprob": -1.0, "rank": None}}), "token 1: .*numbers"),
        (vllm_row({"9": {"logprob": -(10**400), "rank": 1}}), "token 1: .*numbers"),
        (vllm_row({"9": {"logprob": -1.0}}), "token 1: .*and rank"),
        (vllm_row({"9": -1.0}), "token 1: .*needed an id with numbers"),
        (vllm_row(entries((8, -1.0, 1))), r"token 1: found \[8\], needed token 9 too"),
        (vllm_row(entries((9, -1.0, 2), (8, -2.0, 7))), "ranks 1, 2, ... with one gap"),
        (vllm_row(entries((9, -1.0, 1)), (7, 9, 5)), "found 2 rows, needed 3: one for"),
        (vllm_row(entries((9, -1.0, 1)), (7, None)), "needed token ids"),
        (vllm_row(entries((9, 0.01, 1))), "token 1: found 0.01, needed a log-prob"),
        (vllm_row(entries((9, math.nan, 1))), "token 1: found nan, needed a log-prob"),
        (vllm_row(entries((9, -1.0, 1), (100, -2.0, 2))), "found 100, .*from 0 to 99"),
        (vllm_row(entries((9, -1.0, 1), (-1, -2.0, 2))), "found -1, .*from 0 to 99"),
        (vllm_row(entries((9, -1.0, 1), (2**70, -2.0, 2))), "ids of 32 bits"),
        (vllm_row(entries((9, -1.0, 1)), (100, 9)), "token 0: found 100, .*0 to 99"),
        (
            vllm_row(
                {"9": entries((1, -1.0, 1))["1"], "09": entries((1, -2.0, 2))["1"]}
            ),
            "token 1: found 9, needed each id once",
        ),
    ],
)
def test_malformed_vllm_is_refused(tmp_path, line, message):
    assert_refused("vllm", write_lines(tmp_path / "a.jsonl", VLLM, line), message)


def test_what_is_not_json_or_not_there_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(VLLM) + '\n\n{"prompt_logprobs": [nul\n')
    assert_refused("vllm", path, "line 3: found Expecting value.*needed a JSON object")
    for name in FORMATS:
        assert_refused(
            name, tmp_path / "none", "found no file, needed one, or a folder"
        )
    with pytest.raises(ValueError, match="k=0"):
        read("vllm", path, k=0)


def test_a_folder_is_read_in_order_of_names(tmp_path):
    for name, token in (("b.jsonl", 2), ("a.jsonl", 1), ("c.txt", 3)):
        row = entries((token, -0.5, 1))
        write_lines(tmp_path / name, vllm_row(row, (0, token)))
    assert [rows.token_ids[1] for rows in read("vllm", tmp_path)] == [1, 2]


SGLANG = {
    "text": "",
    "meta_info": {
        "input_token_logprobs": [[None, 7, None], [-0.5, 9, "a"], [-6.0, 42, "b"]],
        "input_top_logprobs": [
            None,
            [[-0.5, 9, "a"], [-1.0, 8, "c"], [-2.0, 3, "d"]],
            [[-0.25, 1, "e"], [-2.5, 2, "f"], [-4.0, 3, "g"]],
        ],
    },
}


def test_sglang_gives_tokens_and_their_log_probabilities(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", SGLANG, [SGLANG, SGLANG])
    found = read("sglang", path)
    assert len(found) == 3
    for rows in found:
        assert_rows(rows, **VLLM_ROWS)


def sglang(**changes):
    return {"meta_info": SGLANG["meta_info"] | changes}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": ""}, "line 1: found None, needed a list input_token_logprobs"),
        (sglang(input_top_logprobs=None), "line 1: .*needed a list input_top_logprobs"),
        (
            sglang(input_top_logprobs=[None, [[-1.0, 2, ""]]]),
            "line 1: found 2 input_top_logprobs, needed 3: tokens",
        ),
        (sglang(input_top_logprobs=[[[-1.0, 2, ""]]] * 3), "token 0: .*needed null"),
        (
            sglang(input_top_logprobs=[None, None, [[-1.0, 2, ""]]]),
            "token 1: found None, needed a list of .logprob, id, text.",
        ),
        (
            sglang(input_top_logprobs=[None, [[None, 2, ""]], [[-1.0, 2, ""]]]),
            "token 1: found .None, 2, ''., needed .logprob, id, text.",
        ),
        (
            sglang(input_token_logprobs=[[None, 7, ""], [None, 9, ""], [-1.0, 4, ""]]),
            "token 1: found .None, 9, ''., needed",
        ),
        (
            sglang(input_token_logprobs=[[None, 7, ""], [0.5, 9, ""], [-1.0, 4, ""]]),
            "token 1: found 0.5, needed a log-probability of at most",
        ),
        (
            sglang(input_top_logprobs=[None, [[-1.0, 2, ""]] * 2, [[-1.0, 2, ""]]]),
            "token 1: found 2, needed each id once in a row",
        ),
    ],
)
def test_malformed_sglang_is_refused(tmp_path, line, message):
    assert_refused("sglang", write_lines(tmp_path / "a.jsonl", line), message)


def named(*pairs):
    """Of axolotl's first version: (id, log-probability) each."""
    return [{"token": f"token_id:{i}", "logprob": p} for i, p in pairs]


AXOLOTL = {  # the text has more tokens than the rows, which stand for its last three
    "v1": {
        "messages": "?",
        "logprobs": [named((9, -0.5), (8, -1.0)), None, named((1, -2.0), (2, -0.25))],
    },
    "v2": {
        "messages": "?",
        "logprobs": [[-0.5, -1.0], None, [-2.0, -0.25]],
        "target_token_ids": [[9, 8], None, [1, 2]],
    },
}
AXOLOTL_ROWS = {
    "token_ids": None,
    "ids": [[9, 8, -1], [-1, -1, -1], [2, 1, -1]],
    "log_probs": [[-0.5, -1.0, -INF], [-INF] * 3, [-0.25, -2.0, -INF]],
    "targets": [math.nan] * 3,
}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("parquet", [False, True])
def test_axolotl_rows_stand_for_the_last_tokens(tmp_path, version, parquet):
    samples = [AXOLOTL[version]] * 20
    if parquet:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(samples), path)
    else:
        path = write_lines(tmp_path / "a.jsonl", *samples)
    for source in (path, tmp_path):
        found = read("axolotl", source)
        assert len(found) == 20
        for rows in found:
            assert_rows(rows, **AXOLOTL_ROWS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "found .'messages'., needed a list logprobs"),
        ({"logprobs": []}, r"line 1: found \[\], needed a list logprobs, not empty"),
        ({"logprobs": [[{"token": "9", "logprob": -1}]]}, "token 0: found .*token_id"),
        ({"logprobs": [[{"token": "token_id:a", "logprob": -1.0}]]}, "token 0: found"),
        ({"logprobs": [[{"token": "token_id:9"}]]}, "token 0: found .*token_id"),
        ({"logprobs": [[-1.0]]}, "token 0: found -1.0, .*or target_token_ids"),
        (
            {"logprobs": [[-1.0]], "target_token_ids": [[1], [2]]},
            "line 1: found 2 target_token_ids, needed 1: rows",
        ),
        (
            {"logprobs": [[-1.0]], "target_token_ids": [[1, 2]]},
            "token 0: found .*as many ids as log-probabilities",
        ),
        ({"logprobs": [[-1.0, None]], "target_token_ids": [[1, 2]]}, "token 0: found"),
        ({"logprobs": [[-1.0, -2.0]], "target_token_ids": [[1, 1]]}, "each id once"),
    ],
)
def test_malformed_axolotl_is_refused(tmp_path, line, message):
    assert_refused("axolotl", write_lines(tmp_path / "a.jsonl", line), message)


def test_unknown_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"packed_indices": [1], "b": 2}]), path)
    message = "found columns b, packed_indices, needed"
    assert_refused("axolotl", path, f"{message} logprobs")
    assert_refused("distillkit", path, f"{message} input_ids, bytepacked.*; or .*top_v")
    path.write_text("no parquet")
    assert_refused("distillkit", path, "needed a parquet file")
    assert_refused("axolotl", path, "needed a parquet file")


def raw_table(rows):
    """Of DistillKit: input_ids, token_ids, top_values each."""
    types = {
        "input_ids": pa.list_(pa.uint64()),
        "token_ids": pa.list_(pa.list_(pa.int32())),
        "top_values": pa.list_(pa.list_(pa.float32())),
    }
    table = {name: [row[i] for row in rows] for i, name in enumerate(types)}
    return pa.table(table, schema=pa.schema(list(types.items())))


def test_distillkit_rows_are_for_the_next_token(tmp_path):
    ids, values = [[9, 8, 3], [1, 2, 0]], [[-0.5, -1.0, -2.0], [-0.25, -2.5, -INF]]
    longer = ([*ids, [4, 5, 6]], [*values, [-1.0, -2.0, -3.0]])  # as packed data sets
    rows = [([7, 9, 0], ids, values), ([7, 9, 0], *longer), ([7], [], [])]
    pq.write_table(raw_table(rows), tmp_path / "data_0.parquet")
    *both, single = read("distillkit", tmp_path)
    for found in both:
        assert_rows(
            found,
            token_ids=[7, 9, 0],
            ids=[[-1, -1, -1], [9, 8, 3], [1, 2, -1]],
            log_probs=[[-INF] * 3, values[0], values[1]],
            targets=[math.nan, -0.5, math.nan],  # 0 only fills a slot
        )
    assert_rows(
        single,
        token_ids=[7],
        ids=[[-1] * 3],
        log_probs=[[-INF] * 3],
        targets=[math.nan],
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([7, 9, 4], [[1]], [[-1.0]]), "row 1: found 1 rows, needed 2: one for each"),
        (([7], [[1], [1]], [[-1.0], [-1.0]]), "row 1: found 2 rows, needed 0: one"),
        (
            ([7, 9], [[1, 2]], [[-1.0]]),
            r"row 1: found \(1, 1\) values, needed \(1, 2\)",
        ),
        (([7, 9, 4], [[1, 2], [3]], [[-1.0], [-1.0]]), r"rows of \[1, 2\] values"),
        (([], [], []), "row 1: found null or no input_ids"),
        (([7, None], [[1]], [[-1.0]]), "row 1: found null or no input_ids"),
        (([7, 9], [[None]], [[-1.0]]), "row 1: found null, needed rows of numbers"),
        (([7, 9], None, [[-1.0]]), "row 1: found null, needed rows of numbers"),
        (([7, 9], [[1]], [[math.nan]]), "row 1, token 1: found nan, needed a log-prob"),
        (([7, 9], [[1]], [[17.5]]), "row 1, token 1: found 17.5, needed a log-prob"),
        (([7, 9], [[1, 1]], [[-1.0, -2.0]]), "token 1: found 1, needed each id once"),
    ],
)
def test_malformed_distillkit_is_refused(tmp_path, row, message):
    path = tmp_path / "a.parquet"
    pq.write_table(raw_table([([7, 9], [[1]], [[-1.0]]), row]), path)
    assert_refused("distillkit", path, message)


def test_columns_of_other_types_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    row = {"input_ids": [7, 9], "token_ids": ["a"], "top_values": [[-1.0]]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert_refused("distillkit", path, "rows from 0: found .*needed {'input_ids'")


SETTINGS = {
    "d": VOCAB_SIZE,  # 7 bits
    "k": 3,
    "exact_k": 1,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 2, "num_elements": 2}],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}
# ids 5, 99, 0 as 0000101 1100011 0000000 and three bits to fill up
PACKED_IDS = bytes([0b00001011, 0b10001100, 0b00000000])
# -0.5; -1 - t/4 for t = 0, 1; steps +1 and -2 of 1/8: 11 00 and four bits to fill up
PACKED_LOG_PROBS = struct.pack("<fffeB", -0.5, -1.0, -0.25, 0.125, 0b11000000)


def write_compressed(folder, settings, log_probs, ids=PACKED_IDS, tokens=(7, 99)):
    row = {
        "input_ids": list(tokens),
        "compressed_logprobs": [list(log_probs)] * (len(tokens) - 1),
        "bytepacked_indices": [list(ids)] * (len(tokens) - 1),
    }
    types = [pa.list_(pa.uint64()), *[pa.list_(pa.list_(pa.uint8()))] * 2]
    schema = pa.schema(list(zip(row, types, strict=True)))
    pq.write_table(pa.Table.from_pylist([row] * 2, schema), folder / "data_0.parquet")
    if settings is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize(
    ("changes", "packed", "log_probs"),
    [
        ({}, PACKED_LOG_PROBS, [-0.5, -0.875, -1.5]),
        ({"delta_encoding": True}, PACKED_LOG_PROBS, [-0.5, -1.375, -2.875]),
        (
            {"exact_dtype": "bfloat16"},
            b"\x00\xbf" + PACKED_LOG_PROBS[4:],
            [-0.5, -0.875, -1.5],
        ),
        (
            {"exact_k": 3, "polynomial_terms": None, "residual_bins": []},
            struct.pack("<fff", -0.5, -1.0, -7.0),
            [-0.5, -1.0, -7.0],
        ),
        (
            {
                "exact_k": 0,
                "polynomial_terms": [0, 2, "sqrt"],
                "term_dtype": "float16",
                "residual_bins": [],
                "normalize_t": True,  # t = 0, 1/2, 1
            },
            struct.pack("<eee", -0.5, -1.0, -2.0),
            [-0.5, -0.75 - 2 * math.sqrt(0.5), -3.5],
        ),
        (
            {
                "polynomial_terms": None,
                "residual_bins": [
                    {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 1},
                    {"scale_dtype": "float32", "element_bits": 11, "num_elements": 1},
                ],
            },
            # bits 0 (-1 of 1) and 00000000010 (2 - 1024 of 1/512), each filled up
            struct.pack("<f", -0.5)
            + b"\x80\x3f"
            + bytes([0])
            + struct.pack("<f", 1 / 512)
            + bytes([0b00000000, 0b01000000]),
            [-0.5, -1.0, -1022 / 512],
        ),
    ],
)
def test_compressed_distillkit(tmp_path, changes, packed, log_probs):
    found = read("distillkit", write_compressed(tmp_path, SETTINGS | changes, packed))
    assert len(found) == 2
    for rows in found:
        np.testing.assert_array_equal(rows.token_ids, [7, 99])
        np.testing.assert_array_equal(rows.ids, [[-1] * 3, [5, 99, 0]])
        np.testing.assert_allclose(rows.log_probs[1], log_probs, atol=2e-3)
        if "term_dtype" not in changes:  # every number above is exact in float16
            np.testing.assert_array_equal(rows.log_probs[1], np.float32(log_probs))
        assert rows.target_log_probs[1] == rows.log_probs[1, 1]


def test_compressed_sequence_of_one_token_has_no_rows(tmp_path):
    folder = write_compressed(tmp_path, SETTINGS, PACKED_LOG_PROBS, tokens=[7])
    assert [rows.ids.tolist() for rows in read("distillkit", folder)] == [
        [[-1] * 3]
    ] * 2


@pytest.mark.parametrize("num_bits", [1, 7, 8, 16, 18, 53])
def test_bits_come_out_as_they_went_in(num_bits):
    rng = np.random.default_rng(num_bits)
    values = rng.integers(0, 2**num_bits, (5, 11))
    text = ["".join(format(v, f"0{num_bits}b") for v in row) for row in values]
    size = math.ceil(11 * num_bits / 8)
    packed = [int(t.ljust(size * 8, "0"), 2).to_bytes(size, "big") for t in text]
    data = np.frombuffer(b"".join(packed), np.uint8).reshape(5, size)
    np.testing.assert_array_equal(encodings.unpack_bits(data, num_bits, 11), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": None}, "int"),
        ({"surprise": 1}, "found surprise, needed d, k, exact_k"),
        ({"exact_dtype": "int8"}, "int8 is missing or unknown"),
        ({"polynomial_terms": ["log"]}, "polynomial_terms has 'log'"),
        ({"polynomial_terms": [-1]}, "polynomial_terms has -1"),
        ({"exact_k": 4}, "found d=100, k=3, exact_k=4, needed"),
        ({"exact_k": 2}, "residual_bins hold more than k - exact_k"),
        ({"residual_bins": [{"scale_dtype": "float16"}]}, "element_bits is missing"),
        (
            {"residual_bins": [SETTINGS["residual_bins"][0] | {"element_bits": 0}]},
            "residual_bins need 1 to 63 bits",
        ),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, changes, message):
    write_compressed(tmp_path, SETTINGS | changes, PACKED_LOG_PROBS)
    assert_refused("distillkit", tmp_path, f"compression_config.yaml: .*{message}")


def test_settings_that_do_not_fit_the_rows_are_refused(tmp_path):
    write_compressed(tmp_path, None, PACKED_LOG_PROBS)
    assert_refused("distillkit", tmp_path, "compression_config.yaml is missing")
    (tmp_path / "compression_config.yaml").write_text("a: [\n")
    assert_refused("distillkit", tmp_path, "is not YAML")
    (tmp_path / "compression_config.yaml").write_text("[]")
    assert_refused("distillkit", tmp_path, "found list, needed names and values")
    write_compressed(tmp_path, SETTINGS | {"d": 300}, PACKED_LOG_PROBS)
    message = r"row 0: found rows of \(3, 15\) bytes, needed \(4, 15\), as"
    assert_refused("distillkit", tmp_path, message)
    write_compressed(tmp_path, SETTINGS, PACKED_LOG_PROBS)
    assert_refused("distillkit", tmp_path, "found 99, .*from 0 to 89", vocab_size=90)


def varint(value):
    value &= 2**64 - 1
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def message(number, content):
    """A field of the wire type that has a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def serialise(features, *, packed=True):
    """A tf.Example, of lists of bytes, floats or integers."""
    encoded = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            number, content = 1, b"".join(message(1, value) for value in values)
        elif isinstance(values[0], float):
            number, parts = 2, [struct.pack("<f", value) for value in values]
            content = b"".join(varint(1 << 3 | 5) + part for part in parts)
        else:
            number, parts = 3, [varint(value) for value in values]
            content = b"".join(varint(1 << 3) + part for part in parts)
        if packed and number > 1:
            content = message(1, b"".join(parts))
        entry = message(1, name.encode()) + message(2, message(number, content))
        encoded += message(1, entry)
    return message(1, encoded)


def write_records(path, *records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:2")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_examples_are_parsed_packed_and_unpacked(packed):
    features = {
        "integers": [0, 1, 127, 128, 300, 2**31, -1, 2**63 - 1, -(2**63)],
        "floats": [0.5, -1.25, math.inf],
        "bytes": [b"", b"abc", b"\xff"],
    }
    found = encodings.parse_example(serialise(features, packed=packed))
    assert found["bytes"] == features["bytes"]
    for name in ("integers", "floats"):
        np.testing.assert_array_equal(found[name], features[name])


def test_an_example_of_the_protobuf_library_is_parsed():
    data = "0a270a160a016112111a0f0a0d01ac02ffffffffffffffffff010a0d0a0162120812060a04"
    found = encodings.parse_example(bytes.fromhex(data + "0000003f"))
    assert found["a"].tolist() == [1, 300, -1] and found["b"].tolist() == [0.5]


MAXTEXT = {  # two examples of 3 and 2 tokens and a token of padding
    "inputs": [7, 9, 42, 11, 12, 0],
    "inputs_segmentation": [1, 1, 1, 2, 2, 0],
    "top_k_indices": [9, 8, 1, 2, 50, 51, 3, 4, 60, 61, 0, 1],
    "top_k_logits": [2.0, 1.0, 30.0, 30.0, 0.0, 0.0, -5.0, -3.0, 0.0, 0.0, 0.0, 0.0],
    "sequence_hash": [-1234567890123456789],
}


def test_maxtext_logits_are_normalised_within_each_example(tmp_path):
    path = tmp_path / "teacher_top_k_part_00000.array_record"
    write_records(path, *[serialise(MAXTEXT, packed=p) for p in (True, False, True)])
    found = read("maxtext", tmp_path)
    assert len(found) == 6
    norm, half, last = math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.e**-2)
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert_rows(
            one,
            token_ids=[7, 9, 42],
            ids=[[-1] * 3, [9, 8, -1], [1, 2, -1]],
            log_probs=[
                [-INF] * 3,
                [-norm, -1 - norm, -INF],
                [-half, -half, -INF],
            ],
            targets=[math.nan] * 3,  # what 9 has over the vocabulary is not known
        )
        assert_rows(
            other,
            token_ids=[11, 12],
            ids=[[-1] * 3, [4, 3, -1]],
            log_probs=[[-INF] * 3, [-last, -2 - last, -INF]],
            targets=[math.nan] * 2,
        )


def test_maxtext_without_segments_is_one_sequence(tmp_path):
    del (features := dict(MAXTEXT))["inputs_segmentation"]
    path = write_records(tmp_path / "a.array_record", serialise(features))
    (rows,) = read("maxtext", path, k=1)
    np.testing.assert_array_equal(rows.token_ids, MAXTEXT["inputs"])
    np.testing.assert_array_equal(rows.ids[:, 0], [-1, 9, 1, 50, 4, 60])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k_logits": [1]}, "found .*needed top_k_logits, a list of float32"),
        ({"inputs": [b"abc"]}, "found .*needed inputs, a list of int64"),
        (
            {"inputs": [1, 2, 3, 4, 5]},
            "found 12 top_k_indices, 12 top_k_logits, needed",
        ),
        ({"top_k_indices": [1, 2]}, "found 2 top_k_indices, 12 top_k_logits, needed"),
        ({"inputs_segmentation": [1]}, "found 1 inputs_segmentation, needed 6"),
        ({"inputs_segmentation": [b"1"] * 6}, "found 6 inputs_segmentation, needed 6"),
        ({"top_k_logits": [math.nan] * 12}, "token 1: found nan, needed a log-prob"),
        ({"top_k_logits": [-math.inf] * 12}, "token 1: found nan, needed a log-prob"),
        ({"top_k_indices": [5] * 12}, "token 1: found 5, needed each id once"),
        ({"top_k_indices": [500] * 12}, "token 1: found 500, .*from 0 to 99"),
    ],
)
def test_malformed_maxtext_is_refused(tmp_path, changes, message):
    records = serialise(MAXTEXT), serialise(MAXTEXT | changes)
    path = write_records(tmp_path / "a.array_record", *records)
    assert_refused("maxtext", path, f"record 1.*{message}")


@pytest.mark.parametrize(
    "record",
    [b"", b"\x80\x04\x95", serialise(MAXTEXT)[:-1], b"\x0a\x05ab", b"\xff" * 20],
)
def test_records_that_are_no_examples_are_refused(tmp_path, record):
    path = write_records(tmp_path / "a.array_record", record)
    assert_refused("maxtext", path, "record 0: found .*needed a tf.Example; pickles")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.array_record"
    path.write_bytes(bytes(100))
    assert_refused("maxtext", path, "found 100 bytes, needed a whole ArrayRecord file")
    path.write_bytes(b'{"prompt_logprobs": "\xff"}')
    assert_refused("vllm", path, "line 1: found .*decode byte.*needed a JSON object")
    rows = [make_rows(0, length=1000)]
    FORMATS["distillkit"].write(path, rows)
    whole = bytearray(path.read_bytes())
    whole[100:4000] = bytes(3900)
    path.write_bytes(whole)
    assert_refused("distillkit", path, "rows from 0: found .*, needed {'input_ids'")


def test_rounding_above_zero_becomes_zero(tmp_path):
    (rows,) = read(
        "vllm", write_lines(tmp_path / "a.jsonl", vllm_row(entries((9, 1e-6, 1))))
    )
    assert rows.log_probs[1, 0] == 0 and rows.target_log_probs[1] == 0


def test_every_format_names_its_missing_fields():
    missing = {name: set(tool.missing) for name, tool in FORMATS.items()}
    assert missing == {
        "vllm": {"entropy"},
        "sglang": {"entropy"},
        "distillkit": {"entropy", "target_log_probs"},
        "axolotl": {"tail_mass", "entropy", "target_log_probs"},
        "maxtext": {"tail_mass", "entropy", "target_log_probs"},
    }


def make_rows(seed, *, length, vocab_size=VOCAB_SIZE, k=K):
    """What a teacher with random logits says about random tokens."""
    rng = np.random.default_rng(seed)
    logits_LV = 3 * rng.normal(size=(length, vocab_size))
    log_probs_LV = logits_LV - np.log(np.exp(logits_LV).sum(1, keepdims=True))
    token_ids = rng.integers(0, vocab_size, length).astype(np.int32)
    ids_LK = np.argsort(-log_probs_LV, axis=1)[:, :k].astype(np.int32)
    log_probs_LK = np.take_along_axis(log_probs_LV, ids_LK, 1).astype(np.float32)
    targets_L = log_probs_LV[np.arange(length), token_ids].astype(np.float32)
    ids_LK[0], log_probs_LK[0], targets_L[0] = -1, -INF, math.nan
    return ImportedSequence(token_ids, ids_LK, log_probs_LK, targets_L)


@pytest.mark.parametrize("name", ["vllm", "distillkit"])
def test_what_is_written_is_read_again(tmp_path, name):
    sequences = [make_rows(seed, length=seed + 1) for seed in range(300)]
    path = tmp_path / "a.out"
    FORMATS[name].write(path, iter(sequences))
    found = read(name, path)
    assert len(found) == len(sequences)
    for rows, wanted in zip(found, sequences, strict=True):
        if name == "distillkit":
            stored = (wanted.ids == wanted.token_ids[:, None]).any(1)
            targets = np.where(stored, wanted.target_log_probs, math.nan)
            wanted = wanted._replace(target_log_probs=targets)
        assert_rows(
            rows,
            token_ids=wanted.token_ids,
            ids=wanted.ids,
            log_probs=wanted.log_probs,
            targets=wanted.target_log_probs,
        )


def test_unused_slots_survive_the_round_trip(tmp_path):
    rows = make_rows(0, length=4)
    rows.ids[2, 1:], rows.log_probs[2, 1:] = -1, -INF
    for name in ("vllm", "distillkit"):
        FORMATS[name].write(tmp_path / name, [rows])
        (found,) = read(name, tmp_path / name)
        np.testing.assert_array_equal(found.ids, rows.ids)
        np.testing.assert_array_equal(found.log_probs, rows.log_probs)


def test_what_a_format_cannot_hold_is_not_written(tmp_path):
    rows = make_rows(0, length=4)
    for name in ("vllm", "distillkit"):
        write = FORMATS[name].write
        with pytest.raises(ValueError, match=r"sequence 0: .*needed token ids"):
            write(tmp_path / "a", [rows._replace(token_ids=None)])
        with pytest.raises(ValueError, match=r"sequence 1: .*no row for the first"):
            write(tmp_path / "a", [rows, rows._replace(ids=rows.ids[1:])])
    unknown = rows._replace(target_log_probs=np.full(4, math.nan, np.float32))
    with pytest.raises(ValueError, match=r"sequence 0, token 1: .*of its token"):
        FORMATS["vllm"].write(tmp_path / "a", [unknown])


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xff" * 5000,
        b"\x0a" + b"\xff" * 9 + b"\x01abc",  # a length of 2^64 - 1
        b"\x0a\xff\xff\xff\xff\x0fabc",
        b"\x0a\x80" * 100,
        b"\x00\x00" * 2_000_000,  # millions of empty fields
        message(1, message(1, message(1, b"inputs") + message(2, b"\x1a\xff\x01"))),
        b"garbage" * 1000,
    ],
    ids=range(8),
)
def test_records_of_garbage_are_refused_at_once(tmp_path, record):
    path = write_records(tmp_path / "a.array_record", record)
    assert_refused("maxtext", path, "record 0: found ")


@pytest.mark.parametrize("content", [b"", bytes(131072), b"\xff" * 200_000])
def test_files_of_garbage_are_refused_at_once(tmp_path, content):
    path = tmp_path / "a.array_record"
    path.write_bytes(content)
    assert_refused("maxtext", path, "needed a whole ArrayRecord file")


def test_a_flipped_bit_of_an_array_record_is_found(tmp_path):
    path = write_records(tmp_path / "a.array_record", serialise(MAXTEXT))
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    assert_refused("maxtext", path, "needed a whole ArrayRecord file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x]\nb: [*a, *a]", "anchor or alias"),
        ("[" * 5000, "is not YAML"),
        ("d: .inf\nk: 1\nexact_k: 1\nresidual_bins: []", "cannot convert float"),
        ("d: 100\nk: 9999999999\nexact_k: 1\nresidual_bins: []", "needed d > 1"),
        ("d: 100\nk: 1\nexact_k: 1\nresidual_bins: 7", "not iterable"),
        ("d: 100\nk: 1\nexact_k: 1\nresidual_bins: [7]", "not subscriptable"),
        ("x" * 100_000, "65536 are read"),
    ],
)
def test_hostile_settings_of_compression_are_refused(tmp_path, text, message):
    path = tmp_path / "compression_config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        encodings.read_compression(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def hostile_vllm(**changes):
    entry = {"logprob": -0.5, "rank": 1, "decoded_token": None} | changes
    return {"prompt_token_ids": [7, 9], "prompt_logprobs": [None, {"9": entry}]}


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": ' * 50_000,
        b'{"prompt_logprobs": [null, {"9": {}, "9": {}}]}',
        b"[" * 100,
        b'{"prompt_logprobs": [null, ' + b"9" * 5000 + b"]}",
        b"{}\xff",
        json.dumps(hostile_vllm(logprob="-0.5")).encode(),
        json.dumps(hostile_vllm(logprob=True)).encode(),
        json.dumps(hostile_vllm(logprob=10**400)).encode(),
        json.dumps(hostile_vllm(rank=True)).encode(),
        json.dumps(hostile_vllm(rank=1.0)).encode(),
        json.dumps(hostile_vllm(logprob=math.nan)).encode(),
        json.dumps(hostile_vllm(logprob=math.inf)).encode(),
        b'{"prompt_token_ids": [7, 9], "prompt_logprobs": [null, {"1_0": '
        b'{"logprob": -1.0, "rank": 1}}]}',
        b'{"prompt_token_ids": [true, 9], "prompt_logprobs": [null, {"9": '
        b'{"logprob": -1.0, "rank": 1}}]}',
    ],
    ids=range(14),
)
def test_hostile_lines_are_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    assert_refused("vllm", path, "line 1")


def test_a_long_row_among_many_short_ones_takes_no_memory(tmp_path):
    sample = {
        "target_token_ids": [[1]] * 20_000 + [list(range(20_000))],
        "logprobs": [[-1.0]] * 20_000 + [[-1.0] * 20_000],
    }
    path = write_lines(tmp_path / "a.jsonl", sample)
    assert_refused("axolotl", path, "found 20001 rows of 20000, needed at most")


def test_rows_that_are_no_lists_are_refused(tmp_path):
    for logprobs in ([5], ["ab"], [{"a": 1}], [True]):
        path = write_lines(tmp_path / "a.jsonl", {"logprobs": logprobs})
        assert_refused("axolotl", path, "token 0: found .* needed a list, or null")


def test_a_pipe_among_the_files_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert_refused("vllm", tmp_path, "a.jsonl is no plain file")
    os.rename(tmp_path / "a.jsonl", tmp_path / "a.parquet")
    assert_refused("distillkit", tmp_path, "a.parquet is no plain file")


def test_a_column_that_is_a_bomb_is_refused(tmp_path):
    column = pa.array([bytes(2**22)] * 20)
    table = pa.table({"logprobs": column})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert_refused("axolotl", path, r"found \d+ bytes of a row group in a file of \d+")
