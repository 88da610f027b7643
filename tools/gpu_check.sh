#!/usr/bin/env bash
# One command that proves the GPU side: builds with what is installed (no network, no isolation), runs the CUDA
# tests, then those marked `sanitize` under compute-sanitizer (memcheck, racecheck), then the CUDA benchmarks, and
# writes one JSON with the device, the outcome and the figures: <gpu>-<date>.json.
#
#   tools/gpu_check.sh [--quick]      an eighth of the data, no sanitizer
#
#   OUT     folder for the JSON and the logs       (default: benchmarks/results)
#   PYTHON  interpreter that has torch, numpy, pytest and pybind11   (default: python3)
#   LUTRA_CUDA_ARCHS  architectures to build       (default: this machine's)
#   MODULES folder with modules built elsewhere (_cuda, and _core if it is there): nothing is built here
#   LIMIT   seconds for the tests and for each run of the sanitizer (default: 900)
#   CASES   cases of each test that the sanitizer runs   (default: 4)
#   EACH    seconds for each benchmark             (default: 0.3)
#
# Exit: 0 all well; 1 the build, a test or a benchmark failed; 2 there is no GPU here (nothing is run).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
quick=""
[ "${1:-}" = "--quick" ] && quick="--quick"

gpu="nvidia-smi is not installed"
command -v nvidia-smi >/dev/null 2>&1 &&
  gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>&1 | head -n 1)
if [[ "$gpu" != *,*,* ]]; then
  echo "gpu_check: no NVIDIA GPU here: $gpu" >&2
  exit 2
fi
IFS=, read -r name driver capability <<<"$gpu"
name=$(echo "$name" | xargs) driver=$(echo "$driver" | xargs) capability=$(echo "$capability" | xargs)
archs=${LUTRA_CUDA_ARCHS:-${capability/./}-real}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
file="$out/$(echo "$name" | tr ' A-Z' '-a-z' | tr -cd 'a-z0-9._-')-$(date -u +%Y-%m-%d).json"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "gpu_check: $name, driver $driver, compute capability $capability"

# ---- build, beside the sources: the modules land in a copy of the package that only this run sees
begin=$(date +%s)
mkdir -p "$work/modules"
if [ -n "${MODULES:-}" ]; then
  cp "$MODULES"/_*.so "$work/modules/" && echo "modules from $MODULES" >"$out/build.log"
else
  generator=()
  command -v ninja >/dev/null 2>&1 && generator=(-G Ninja)
  cmake -S . -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DLUTRA_CUDA=ON \
    -DLUTRA_CUDA_ARCHS="$archs" -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/modules" >"$out/build.log" 2>&1 &&
    cmake --build "$work/build" -j "$(nproc)" >>"$out/build.log" 2>&1
fi
build=$?
seconds=$(($(date +%s) - begin))
echo "gpu_check: build $([ $build = 0 ] && echo done || echo FAILED) after $seconds s (log: $out/build.log)"

tests=1 sanitizer=1 bench=1
if [ $build = 0 ]; then
  cp -r python "$work/python" && cp "$work"/modules/*.so "$work/python/lutra/"
  export PYTHONPATH="$work/python${PYTHONPATH:+:$PYTHONPATH}"
  # The sanitizer runs beside the tests. Every allocation comes from the driver: torch's and CuPy's pools would hide
  # a step over the end of an array.
  sanitizer=skipped
  if [ -z "$quick" ] && command -v compute-sanitizer >/dev/null 2>&1; then
    sanitizer=0
    for tool in memcheck racecheck; do
      (
        LUTRA_SANITIZE_CASES=${CASES:-4} PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 20 "${LIMIT:-900}" compute-sanitizer --tool "$tool" \
          --error-exitcode 9 --target-processes all --kernel-regex kns=lutra \
          "$PYTHON" -m pytest -q -m "cuda and sanitize" -o addopts="-ra --strict-markers" -p no:cacheprovider \
          tests/cuda >"$out/$tool.log" 2>&1
        echo $? >"$work/$tool.rc"
      ) &
    done
  fi
  jobs=()  # in parallel where pytest-xdist is there: most of the time goes to the reference
  "$PYTHON" -c 'import xdist' 2>/dev/null && jobs=(-n $(($(nproc) * 3 / 4 + 1)))
  # at the limit an interrupt, so that pytest still names what failed
  timeout -s INT -k 20 "${LIMIT:-900}" "$PYTHON" -m pytest -q -m cuda "${jobs[@]}" -o addopts="-ra --strict-markers" \
    --junitxml "$work/tests.xml" -p no:cacheprovider tests 2>&1 | tee "$out/tests.log"
  tests=${PIPESTATUS[0]}
  if [ "$sanitizer" = 0 ]; then
    wait
    for tool in memcheck racecheck; do
      [ "$(cat "$work/$tool.rc")" = 0 ] || sanitizer=1
      echo "gpu_check: $tool exits with $(cat "$work/$tool.rc"): $(tail -n 1 "$out/$tool.log")"
    done
  fi
  "$PYTHON" benchmarks/cuda/bench_cuda.py $quick --seconds "${EACH:-0.3}" --json "$work/bench.json" 2>&1 | tee "$out/bench.log"
  bench=${PIPESTATUS[0]}
else
  tail -n 30 "$out/build.log"
fi

"$PYTHON" - "$work" "$file" "$name" "$driver" "$capability" "$build" "$seconds" "$tests" "$sanitizer" "$bench" \
  "$archs" <<'EOF'
import datetime, json, pathlib, platform, subprocess, sys
import xml.etree.ElementTree as xml

work, file, name, driver, capability, build, seconds, tests, sanitizer, bench, archs = sys.argv[1:]
work = pathlib.Path(work)


def version(module):
    try:
        return __import__(module).__version__
    except Exception as error:
        return f"none ({type(error).__name__})"


def command(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    except (OSError, IndexError):
        return "unknown"


counts = None
if (work / "tests.xml").exists():
    suite = next(xml.parse(work / "tests.xml").iter("testsuite"))
    counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    counts["failed"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ][:100]
ran = counts is not None and counts["tests"] > counts["skipped"]  # tests that were all skipped prove nothing
figures = json.loads((work / "bench.json").read_text()) if (work / "bench.json").exists() else None
report = {
    "device": name, "driver": driver, "compute_capability": capability, "architectures": archs,
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "python": platform.python_version(), "torch": version("torch"), "cupy": version("cupy"),
    "numpy": version("numpy"), "nvcc": command("nvcc", "--version"),
    "commit": command("git", "rev-parse", "HEAD"),
    "build": {"ok": build == "0", "seconds": int(seconds)},
    "tests": {"ok": tests == "0" and ran, **(counts or {})},
    "sanitizer": {"ok": sanitizer != "1", "ran": sanitizer != "skipped"},
    "benchmarks": {"ok": bench == "0", **(figures or {})},
}
pathlib.Path(file).write_text(json.dumps(report, indent=1) + "\n")
wrong = [part for part in ("build", "tests", "sanitizer", "benchmarks") if not report[part]["ok"]]
print(f"gpu_check: wrote {file}; " + (f"FAILED: {', '.join(wrong)}" if wrong else "all well"))
sys.exit(1 if wrong else 0)
EOF
