"""The lookup layers: their speed against the dense layers they replace and against torch's operations, and
what they are good for.

``python benchmarks/bench_layers.py`` runs all sections on one thread (hours: ``twins`` trains language
models), ``--threads 2`` on two, ``--only memory_linear`` some, ``--quick`` small sizes; ``--json FILE`` keeps
the rows, ``--plots FOLDER`` draws. Results are compared with the composition in torch before they are timed;
the ways take turns; times are medians in milliseconds, of the process's time on one thread and of wall clock
on more.

``pytest benchmarks/bench_layers.py`` runs the quick form. A section is a file in ``layers/``: ``rows(quick)``
and ``line(row)``, or ``lines(quick)`` of text; ``expect(rows)`` asserts what quick rows must show.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from layers import (
    converted,
    embeddings,
    ffn_triggers,
    memory_attention,
    memory_linear,
    ngrams,
    product_keys,
    sent2vec,
    sparse,
    store,
    twins,
)
from real_data import data_folder
from sections import check_quick, run

SECTIONS = {
    "memory_linear": memory_linear,
    "converted": converted,
    "product_keys": product_keys,
    "sparse": sparse,
    "embeddings": embeddings,
    "memory_attention": memory_attention,
    "ffn_triggers": ffn_triggers,
    "ngrams": ngrams,
    "store": store,
    "sent2vec": sent2vec,
    "twins": twins,
}
NEEDS = {"embeddings": ["scipy"], "twins": ["matplotlib"]}


@pytest.mark.parametrize("name", SECTIONS)
def test_quick(name):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    if name == "embeddings" and data_folder() is None:
        pytest.skip("no real data here")
    check_quick(SECTIONS[name])


if __name__ == "__main__":
    run(SECTIONS, __doc__)
