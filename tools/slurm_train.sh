#!/usr/bin/env bash
# Train as a Slurm job:
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#       tools/slurm_train.sh [--requeue] PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
# With --requeue the job goes to the queue, and back to it whenever it is preempted or out of time: it is told 2 minutes
# before, saves a checkpoint, and goes on from there. SBATCH_ARGS: further options, such as `--time=24:00:00`.
set -euo pipefail

REQUEUE=
if [ "${1:-}" = --requeue ]; then
    REQUEUE=1
    shift
fi
if [ $# -lt 4 ]; then
    echo "usage: $0 [--requeue] PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
    exit 2
fi
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

JOB=(
    --partition="$PARTITION"
    --job-name="$JOB_NAME"
    --gres="gpu:$GPUS_PER_NODE"
    --ntasks="$GPUS"
    --ntasks-per-node="$GPUS_PER_NODE"
    --cpus-per-task="${CPUS_PER_TASK:-5}"
)
# shellcheck disable=SC2206  # SRUN_ARGS is a list of arguments
RUN=(srun "${JOB[@]}" --kill-on-bad-exit=1 ${SRUN_ARGS:-})
TRAIN=(
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$CONFIG" --work-dir "$WORK_DIR" --launcher slurm
    ${REQUEUE:+--resume} "${@:5}"
)
if [ -z "$REQUEUE" ]; then
    exec "${RUN[@]}" "${TRAIN[@]}"
fi
# Status 75: a checkpoint is saved, and there is more to train. Slurm may have queued a preempted job again itself.
# shellcheck disable=SC2086  # SBATCH_ARGS is a list of arguments
sbatch "${JOB[@]}" --requeue --signal=USR1@120 --open-mode=append ${SBATCH_ARGS:-} <<END
#!/usr/bin/env bash
status=0
$(printf '%q ' "${RUN[@]}" "${TRAIN[@]}") || status=\$?
[ \$status -ne 75 ] || scontrol requeue "\$SLURM_JOB_ID" || true
exit \$status
END
