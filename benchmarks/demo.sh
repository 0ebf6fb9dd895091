#!/usr/bin/env bash
# The whole way in one go: draw a set, train on two ranks, stop half way, go on, evaluate, export.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
start=$SECONDS

say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - start)); }

rm -rf "$run" shards/demo exported/demo

say "drawing 4,096 + 512 scenes"
nsphere pack scenes shards/demo/train.tar --count 4096
nsphere pack scenes shards/demo/val.tar --count 512 --seed 1

say "training a small CLIP on 2 ranks; SIGTERM half way"
nsphere train configs/demo.toml --nproc 2 --run "$run" &
trainer=$!
until [ -d "$run/checkpoints/step-00000120" ] || ! kill -0 $trainer 2>/dev/null; do sleep 0.5; done
kill -TERM $trainer 2>/dev/null || true
code=0
wait $trainer || code=$?
[ $code -eq 85 ] || { echo "expected exit code 85 (saved and stopped), got $code"; exit 1; }

say "the same command goes on"
nsphere train configs/demo.toml --nproc 2 --run "$run"

say "evaluating"
nsphere eval "$run" --task retrieval --task zero_shot | tee "$run/eval.json"

say "report and export"
nsphere report "$run"
nsphere export "$run" exported/demo

say "done"
cat <<END
  run folder   $run   (config.toml, metrics.jsonl, checkpoints/, log/)
  evaluation   $run/eval.json
  report       $run/report.html
  open_clip    exported/demo   open_clip.create_model_and_transforms("local-dir:exported/demo")
END
