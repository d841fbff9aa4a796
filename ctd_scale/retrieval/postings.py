"""The best documents of a few words, compiled by Numba; untyped here because Numba derives the types.

Postings are columns of a sparse matrix: the documents of word w are `ids[offsets[w] : offsets[w + 1]]`, ascending, and
`impacts` says how much the word adds to the score of each. Words are read by falling impact. As soon as those that
remain cannot lift a document that has none of the earlier ones into the list, only the documents met so far are looked
up in them (MaxScore; Turtle and Flood, 1995). The list is that of the full sum.
"""

from __future__ import annotations

import numba
import numpy as np

compiled = numba.njit(nogil=True, cache=True)


@compiled
def best_documents(words, counts, offsets, ids, impacts, maxima, scores, limit):  # type: ignore[no-untyped-def]
    """The `limit` documents of highest summed impact above 0, best first, ties by number; and these sums.

    `counts` says how often each (distinct) word is asked for, `maxima` is the largest impact of every word, `scores` is
    scratch: one zero per document, and zeros again afterwards.
    """
    order = np.argsort(-maxima[words] * counts, kind="mergesort")
    remaining, size = 0.0, 0
    for place in order:
        remaining += maxima[words[place]] * counts[place]
        size += offsets[words[place] + 1] - offsets[words[place]]
    met, found, highest = np.empty(size, np.int32), 0, np.float32(0)
    for place in order:
        start, stop = offsets[words[place]], offsets[words[place] + 1]
        least = -1.0
        if highest > remaining:
            least = lowest_of_best(met[:found], scores, limit)
        if least > remaining:
            found = keep_hopeful(met, found, scores, least - remaining)
            add_to_met(met[:found], scores, ids[start:stop], impacts[start:stop], counts[place])
        else:
            for posting in range(start, stop):
                document = ids[posting]
                if scores[document] == 0:
                    met[found] = document
                    found += 1
                scores[document] += impacts[posting] * counts[place]
                highest = max(highest, scores[document])
        remaining -= maxima[words[place]] * counts[place]
    least = lowest_of_best(met[:found], scores, limit)
    found = keep_hopeful(met, found, scores, least)
    best = np.sort(met[:found])
    best = best[np.argsort(-scores[best], kind="mergesort")]
    sums = scores[best]
    scores[best] = 0
    return best[:limit], sums[:limit]


@compiled
def lowest_of_best(met, scores, limit):  # type: ignore[no-untyped-def]
    """Score of the last document in the list as it is so far; -1 where it is not full."""
    if len(met) < limit:
        return -1.0
    return float(-np.partition(-scores[met], limit - 1)[limit - 1])


@compiled
def keep_hopeful(met, found, scores, least):  # type: ignore[no-untyped-def]
    """Forget what is below `least`, leaving the others in front; returns how many these are."""
    kept = 0
    for place in range(found):
        document = met[place]
        if scores[document] >= least * (1 - 1e-5):  # what rounding may have taken away
            met[kept] = document
            kept += 1
        else:
            scores[document] = 0
    return kept


@compiled
def add_to_met(met, scores, ids, impacts, count):  # type: ignore[no-untyped-def]
    """Add a word to the documents that were met, and to no others."""
    if len(met) * 24 > len(ids):  # a look-up takes about as many steps
        for posting in range(len(ids)):
            if scores[ids[posting]] > 0:
                scores[ids[posting]] += impacts[posting] * count
        return
    for document in met:
        posting = np.searchsorted(ids, document)
        if posting < len(ids) and ids[posting] == document:
            scores[document] += impacts[posting] * count
