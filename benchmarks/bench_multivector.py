"""Many vectors a document: MaxSim, fixed dimensional encodings, and what MultiVector finds.

``python benchmarks/bench_multivector.py`` runs all sections on one thread, ``--threads 2`` on two, ``--only
maxsim`` some, ``--quick`` small sizes; ``--json FILE`` keeps the rows, ``--plots FOLDER`` draws. Results are
compared with the composition in torch or NumPy before they are timed; the ways take turns; times are medians.

``pytest benchmarks/bench_multivector.py`` runs the quick form. A section is a file in ``multivector/``.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from multivector import blocks, fde, maxsim, quality, sizes
from sections import check_quick, run

SECTIONS = {"fde": fde, "maxsim": maxsim, "blocks": blocks, "quality": quality, "sizes": sizes}


@pytest.mark.parametrize("name", SECTIONS)
def test_quick(name):
    check_quick(SECTIONS[name])


if __name__ == "__main__":
    run(SECTIONS, __doc__)
