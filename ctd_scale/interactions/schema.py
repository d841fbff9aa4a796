"""What a good row is: vectorised checks that give every row a reason to refuse it, or none.

A batch comes from the reader with our column names and the file's own types; it leaves with text ids, a time
as int64 and a `reason` (null = good). Nothing here reads files or knows Ray.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Seconds beyond this (292,000 years) no longer fit an int64 of microseconds; epoch milliseconds still do.
MAX_SECONDS = 9_200_000_000_000
INTEGER = r"^-?[0-9]+(\.0*)?$"
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
CONTROL = r"[\p{Cc}\x{2028}\x{2029}]+"

# Before the name of a number of the items, which may be called anything.
ATTRIBUTE = "attribute:"

UNPARSABLE_LINE = "unparsable line"
MISSING_USER = "missing user_id"
MISSING_ITEM = "missing item_id"
MISSING_TIME = "missing time"
UNPARSABLE_TIME = "unparsable time"
UNPARSABLE_RATING = "unparsable rating"
UNKNOWN_ITEM = "unknown item"
DUPLICATE_ITEM = "duplicate item_id"
DUPLICATE = "duplicate"

CHECKED_INTERACTION = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("order", pa.int64()),
        ("time", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("item", pa.int32()),
    ]
)


class BadInputError(ValueError):
    """The raw files cannot be used; the message names the file, what is wrong and the fix."""


def check_interactions(raw: pa.RecordBatch, *, position: bool, known_items: pa.Array) -> pa.Table:
    """Rows as user_id, item_id, order, time (raw text), row, reason (null = good), item (place in `known_items`).

    `raw` has user, item, order, rating, row, unparsable. `order` is microseconds since 1970, or the number
    itself where `position`.
    """
    users, items, times, ratings = (as_text(raw.column(name)) for name in ("user", "item", "order", "rating"))
    order = parse_position(raw.column("order")) if position else parse_time(raw.column("order"))
    item = pc.index_in(items, value_set=known_items, skip_nulls=True)
    rated = pc.fill_null(pc.match_substring_regex(pc.utf8_trim_whitespace(ratings), NUMBER), True)
    problems = {
        UNPARSABLE_LINE: raw.column("unparsable"),
        MISSING_USER: pc.is_null(users),
        MISSING_ITEM: pc.is_null(items),
        MISSING_TIME: pc.is_null(times),
        UNPARSABLE_TIME: pc.is_null(order),
        UNPARSABLE_RATING: pc.invert(rated),
        UNKNOWN_ITEM: pc.is_null(item),
    }
    columns = [users, items, order, times, raw.column("row"), _first_problem(problems), item]
    return pa.table(columns, schema=CHECKED_INTERACTION)


def check_items(raw: pa.RecordBatch) -> pa.Table:
    """Rows as item_id, title, category, row, reason (null = good), and the attributes as `parse_number` gives them.

    `raw` has item, title, category, row, unparsable and the attributes. Duplicates need all rows:
    `mark_duplicate_items`.
    """
    items = as_text(raw.column("item"))
    problems = {UNPARSABLE_LINE: raw.column("unparsable"), MISSING_ITEM: pc.is_null(items)}
    columns = [items, as_text(raw.column("title")), as_text(raw.column("category")), raw.column("row")]
    table = pa.table([*columns, _first_problem(problems)], names=["item_id", "title", "category", "row", "reason"])
    for name in attributes_of(raw):
        table = table.append_column(name, parse_number(raw.column(name)))
    return table


def attributes_of(table: pa.Table | pa.RecordBatch) -> list[str]:
    """The columns that are numbers of the items."""
    return [name for name in table.schema.names if name.startswith(ATTRIBUTE)]


def mark_duplicate_items(items: pa.Table) -> pa.Table:
    """The same rows, with every good row whose item_id a good row above already has refused."""
    good = pc.is_null(items["reason"])
    rows = pa.array(np.arange(len(items)))
    first = pa.table({"item_id": items["item_id"], "at": rows}).filter(good)
    first = first.group_by("item_id", use_threads=False).aggregate([("at", "min")])
    kept = pc.is_in(rows, value_set=first["at_min"].combine_chunks())
    reason = pc.if_else(pc.and_(good, pc.invert(kept)), DUPLICATE_ITEM, items["reason"])
    return items.set_column(items.schema.get_field_index("reason"), "reason", reason)


def clean_titles(items: pa.Table, max_chars: int) -> tuple[pa.Table, int, int]:
    """One line per title, at most `max_chars` characters; (items, titles cut, titles missing).

    Where there is no title the category, or else the id, takes its place.
    """
    category = pc.fill_null(_one_line(items["category"]), "")
    given = pc.fill_null(_one_line(items["title"]), "")
    missing = pc.equal(given, "")
    instead = pc.if_else(pc.equal(category, ""), _one_line(items["item_id"]), category)
    title = pc.if_else(missing, instead, given)
    cut = pc.greater(pc.utf8_length(title), max_chars)
    title = pc.if_else(cut, pc.utf8_slice_codeunits(title, 0, max_chars), title)
    kept = {name: items[name] for name in attributes_of(items)}
    cleaned = pa.table({"item_id": items["item_id"], "title": title, "category": category, **kept})
    return cleaned, pc.sum(cut).as_py() or 0, pc.sum(missing).as_py() or 0


def as_text(values: pa.Array) -> pa.Array:
    """Any column as text: the numbers 5, 5.0 and the decimal 5.00 are "5", a UUID is as it is usually written, a list
    its texts, one after the other; empty text, NaN and invalid UTF-8 are null.

    Nothing is stripped. Raises BadInputError for nested types other than lists of text.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        return _float_text(values.cast(pa.float64()))
    if pa.types.is_decimal(values.type):
        return _decimal_text(values)
    if values.type == pa.uuid():
        values = pa.array([None if each is None else str(each) for each in values.to_pylist()], pa.string())
    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    try:
        if is_list and not pa.types.is_nested(values.type.value_type):
            is_bytes = pa.types.is_binary(values.type.value_type) or pa.types.is_large_binary(values.type.value_type)
            values = _joined(values.cast(pa.list_(pa.binary() if is_bytes else pa.string())))
        # By way of binary: only that cast looks at the bytes, a Parquet file may call anything a string.
        if pa.types.is_fixed_size_binary(values.type):
            values = values.cast(pa.binary())
        if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
            values = values.cast(pa.string()).cast(pa.binary())
        text = cast_or_null(values, pa.string())
    except pa.ArrowNotImplementedError:
        raise BadInputError(f"{values.type} is neither text, number nor time") from None
    return pc.if_else(pc.equal(text, ""), None, text)


def parse_time(values: pa.Array) -> pa.Array:
    """Microseconds since 1970 (UTC) as int64; null where there is none or it cannot be read.

    Reads unix seconds as numbers or text, ISO-8601 text (no zone = UTC), Arrow dates and timestamps.
    """
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(pa.int64())
    text = pc.utf8_trim_whitespace(as_text(values))
    is_integer = pc.match_substring_regex(text, r"^-?[0-9]+$")
    is_number = pc.match_substring_regex(text, NUMBER)
    whole = _bounded(cast_or_null(pc.if_else(is_integer, text, None), pa.int64()))
    exact = _bounded(cast_or_null(pc.if_else(pc.and_not(is_number, is_integer), text, None), pa.float64()))
    fraction = pc.round(pc.multiply(exact, 1e6)).cast(pa.int64())
    iso = pc.replace_substring_regex(pc.if_else(is_number, None, text), r"(\.[0-9]{6})[0-9]+", r"\1")
    has_zone = pc.match_substring_regex(iso, r"[0-9:.](Z|[+-][0-9]{2}:?([0-9]{2})?)$")
    zoned = pc.and_(has_zone, pc.match_substring(iso, ":"))  # the "-05" of 2024-01-05 is a day
    utc = cast_or_null(pc.if_else(zoned, iso, None), pa.timestamp("us", "UTC")).cast(pa.int64())
    local = cast_or_null(pc.if_else(zoned, None, iso), pa.timestamp("us")).cast(pa.int64())
    return pc.coalesce(pc.multiply(whole, 1_000_000), fraction, utc, local)


def parse_position(values: pa.Array) -> pa.Array:
    """Whole numbers (or text of them) as int64; null where there is none or it is not whole."""
    if pa.types.is_integer(values.type):
        return cast_or_null(values, pa.int64())
    text = pc.utf8_trim_whitespace(as_text(values))
    whole = pc.if_else(pc.match_substring_regex(text, INTEGER), text, None)
    return cast_or_null(pc.replace_substring_regex(whole, r"\.0*$", ""), pa.int64())


def parse_number(values: pa.Array) -> pa.Array:
    """Numbers, or text of them, as float64: null where there is none, NaN where what is there is no finite number."""
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64(), safe=False)
        # A float column has NaN where a value is missing.
        return pc.if_else(pc.is_inf(numbers), np.nan, pc.if_else(pc.is_nan(numbers), None, numbers))
    text = pc.utf8_trim_whitespace(as_text(values))
    text = pc.if_else(pc.equal(text, ""), None, text)
    numbers = cast_or_null(pc.if_else(pc.match_substring_regex(text, NUMBER), text, None), pa.float64())
    read = pc.fill_null(pc.is_finite(numbers), False)
    return pc.if_else(pc.is_null(text), None, pc.if_else(read, numbers, np.nan))


def cast_or_null(values: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast, with null for the values that cannot be: halves what fails until the culprits stand alone."""
    try:
        return values.cast(target)
    except pa.ArrowInvalid:
        if len(values) == 1:
            return pa.nulls(1, target)
        half = len(values) // 2
        return pa.concat_arrays([cast_or_null(values[:half], target), cast_or_null(values[half:], target)])


def _bounded(seconds: pa.Array) -> pa.Array:
    # Not pc.abs: the smallest int64 has no absolute value.
    low, high = (pa.scalar(limit, seconds.type) for limit in (-MAX_SECONDS, MAX_SECONDS))
    inside = pc.and_(pc.greater_equal(seconds, low), pc.less_equal(seconds, high))
    return pc.if_else(inside, seconds, None)


def _joined(lists: pa.ListArray) -> pa.Array:
    """The texts of each list, one after the other; those that are missing are left out."""
    words = lists.flatten()
    if words.null_count:
        ends = np.cumsum([0, *pc.fill_null(pc.list_value_length(lists), 0).to_numpy()])
        kept = np.cumsum([0, *words.is_valid().to_numpy(zero_copy_only=False)])
        lists = pa.ListArray.from_arrays(pa.array(kept[ends], pa.int32()), words.drop_null(), mask=lists.is_null())
    return pc.binary_join(lists, pa.scalar(" ").cast(lists.type.value_type))


def _decimal_text(values: pa.Array) -> pa.Array:
    text = values.cast(pa.string())
    if pc.any(pc.match_substring(text, "E")).as_py():  # such as 0E-18
        text = pa.array([None if each is None else f"{each:f}" for each in values.to_pylist()], pa.string())
    fraction = pc.match_substring(text, ".")
    return pc.if_else(fraction, pc.utf8_rtrim(pc.utf8_rtrim(text, "0"), "."), text)


def _float_text(values: pa.Array) -> pa.Array:
    values = pc.if_else(pc.is_nan(values), None, values)
    # Ids above 2**53 have lost digits as floats already; they keep the text of the float.
    whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**53))
    integers = pc.if_else(whole, values, 0.0).cast(pa.int64()).cast(pa.string())
    return pc.if_else(whole, integers, values.cast(pa.string()))


def _one_line(text: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(text, CONTROL, " "))


def _first_problem(problems: dict[str, pa.Array]) -> pa.Array:
    conditions = pc.make_struct(*problems.values(), field_names=list(problems))
    return pc.case_when(conditions, *(pa.scalar(name, pa.string()) for name in problems))
