#!/usr/bin/env bash
# Trains on Cloud TPU VMs, a single host or a pod slice:
#
#   bash launch/tpu_vm.sh SUBCOMMAND [--option=value ...] [-- FLAGS OF causalfusion_jax.train]
#
#   create    requests the TPU as a queued resource and waits until it is allocated
#   install   copies REPO to all workers and installs it; copies DATA to their disks
#   run       starts training on all workers, in the background, and follows the log of worker 0
#   logs      follows that log; ends with the run and its exit status
#   stop      has training save and stop
#   resume    continues the run in any state of the TPU: recreates it, installs, runs
#   status    state of the TPU, and the last line of the log
#   delete    releases the TPU (WORKDIR is kept)
#
# Options, as --name=... or NAME=... in the environment:
#
#   NAME              of the TPU
#   ZONE, PROJECT     of the TPU, and billed
#   ACCELERATOR_TYPE  for example v6e-8 (one host), v6e-16, v5p-32 (slices)
#   RUNTIME_VERSION   default: the one for ACCELERATOR_TYPE
#   SPOT              1 [default]: cheaper, may be preempted; 0: on demand
#   SERVICE_ACCOUNT   default: the project's
#   CONFIG            configs/NAME.py or configs/NAME.py:ARG
#   WORKDIR           of the run: gs://BUCKET/FOLDER, mounted on every worker, or a path there
#   DATA              gs://BUCKET/FOLDER that becomes config.data.path; optional
#   REPO              a git checkout (its HEAD) or a git URL [this checkout]
#   COMMAND           run this instead of training with CONFIG and WORKDIR; stop sends SIGTERM to all of it
#   FOLLOW            1 [default]: run and resume follow the log; 0: they return
#
#   --dry_run         prints the commands; needs no gcloud. For resume, those after a preemption.
#
# The exit status of run, logs and resume is 0 if the run is complete, 75 if it was interrupted (stopped,
# preempted, connection lost) and resume continues it; otherwise it failed, with that status. For resume,
# 75 also means that the TPU is not available now. Trains through any number of preemptions:
#
#   until bash launch/tpu_vm.sh resume; do [ $? = 75 ] || break; sleep 60; done

# Single quotes hold what the workers expand.
# shellcheck disable=SC2016

set -euo pipefail

OPTIONS="NAME ZONE PROJECT ACCELERATOR_TYPE RUNTIME_VERSION SPOT SERVICE_ACCOUNT"
OPTIONS+=" CONFIG WORKDIR DATA REPO COMMAND FOLLOW"
SUBCOMMANDS="create install run logs stop resume status delete"

INTERRUPTED=75

fail() {
  echo "error: $*" >&2
  exit 2
}

# Exits; the same command may continue later.
interrupted() {
  echo "interrupted: $*" >&2
  exit "$INTERRUPTED"
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# One word of shell, quoted if necessary.
quote() {
  case "$1" in
    *[!A-Za-z0-9_./:=@%+,-]* | "") printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

# Runs a command, or prints it as it would be typed.
run_or_show() {
  if [[ "$dry_run" == 0 ]]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    line+=" $(quote "$word")"
  done
  printf '%s\n' "${line# }"
}

# Fails, naming all of these options that are not set.
need() {
  local option missing="" flags=""
  for option in "$@"; do
    if [[ -z "${!option:-}" ]]; then
      missing+=", $option"
      flags+=" --$(printf '%s' "$option" | tr '[:upper:]' '[:lower:]')=..."
    fi
  done
  [[ -z "$missing" ]] || fail "${missing#, }: needed by $subcommand; give$flags, or set it in the environment"
}

# --- gcloud ---------------------------------------------------------------------------

queued() {
  local verb="$1"
  shift
  run_or_show gcloud compute tpus queued-resources "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" "$@"
}

# A script on one worker, or on all.
on_workers() {
  run_or_show gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

# Empty if there is no such TPU.
tpu_state() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

wait_until_active() {
  if [[ "$dry_run" == 1 ]]; then
    echo "# until it says ACTIVE:"
    queued describe --format='value(state.state)'
    return
  fi
  local state=""
  while true; do
    state="$(tpu_state)"
    echo "$(date +%H:%M:%S) $NAME is ${state:-not there}"
    case "$state" in
      ACTIVE) break ;;
      FAILED | SUSPENDED | SUSPENDING | "") interrupted "$NAME is ${state:-not there}; resume recreates it" ;;
    esac
    sleep 30
  done
  # A worker exists before it accepts connections.
  local attempt
  for attempt in 1 2 3 4 5 6; do
    on_workers all true && return
    echo "workers do not answer yet ($attempt of 6)"
    sleep 20
  done
  interrupted "the workers of $NAME do not answer"
}

# --- What the workers run -------------------------------------------------------------

# A path on the workers, as a word of shell: below the mount point for gs://, else itself.
there() {
  case "$1" in
    gs://*) printf '"$HOME"/%s' "$(quote "gcs/${1#gs://}")" ;;
    *) quote "$1" ;;
  esac
}

# Mounts the bucket of WORKDIR. Metadata are not cached: workers must see each other's files immediately.
mount_script() {
  [[ "${WORKDIR:-}" == gs://* ]] || return 0
  local bucket="${WORKDIR#gs://}"
  bucket="$(quote "${bucket%%/*}")"
  cat <<SCRIPT
command -v gcsfuse > /dev/null || sudo apt-get install --yes --quiet gcsfuse ||
  { echo "error: gcsfuse cannot be installed; see launch/README.md" >&2; exit 1; }
mkdir -p "\$HOME/gcs/"$bucket
mountpoint --quiet "\$HOME/gcs/"$bucket || gcsfuse --implicit-dirs --rename-dir-limit=200000 \\
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $bucket "\$HOME/gcs/"$bucket
SCRIPT
}

install_script() {
  echo 'set -eu'
  case "$REPO" in
    *://* | git@*)
      echo 'rm -rf "$HOME/causalfusion_jax"'
      echo "git clone --quiet --depth=1 $(quote "$REPO") \"\$HOME/causalfusion_jax\""
      ;;
    *)
      echo 'rm -rf "$HOME/causalfusion_jax" && mkdir "$HOME/causalfusion_jax"'
      echo 'tar -xzf "$HOME/causalfusion_jax.tar.gz" -C "$HOME/causalfusion_jax"'
      ;;
  esac
  # TPU images have an older Python than the project needs; uv installs one.
  cat <<'SCRIPT'
python3 -m pip install --quiet --user uv || python3 -m pip install --quiet --user --break-system-packages uv
"$HOME/.local/bin/uv" venv --quiet --allow-existing --python=3.12 "$HOME/venv"
"$HOME/.local/bin/uv" pip install --quiet --python="$HOME/venv/bin/python" --editable "$HOME/causalfusion_jax[tpu]"
SCRIPT
  mount_script
  if [[ -n "${DATA:-}" ]]; then
    echo "mkdir -p \"\$HOME/data\" && gcloud storage rsync --recursive $(quote "$DATA") \"\$HOME/data\""
  fi
  echo 'touch "$HOME/venv/.installed"'
}

# alive: whether the last run is still active. Its process id may have been reused by another process,
# and after a restart of the machine the start time (ticks since then) may be the same, too.
ALIVE_SCRIPT='started() { sed "s/.*) //" "/proc/$1/stat" 2> /dev/null | cut -d " " -f 20; }
boot_id() { cat /proc/sys/kernel/random/boot_id; }
alive() {
  read -r pid start boot 2> /dev/null < "$HOME/run/pid" || return 1
  [ -n "$start" ] && [ "$start" = "$(started "$pid")" ] && [ "$boot" = "$(boot_id)" ]
}
'

run_script() {
  local command="${COMMAND:-}" flag
  if [[ -z "$command" ]]; then
    # exec: the signal of stop must reach training, not a shell around it.
    command="exec python -m causalfusion_jax.train --multihost --config=$(quote "$CONFIG") --workdir=$(there "$WORKDIR")"
    [[ -z "${DATA:-}" ]] || command+=' --config.data.path="$HOME/data"'
    for flag in ${train_flags[@]+"${train_flags[@]}"}; do
      command+=" $(quote "$flag")"
    done
  fi
  cat <<SCRIPT
set -eu
[ -f "\$HOME/venv/.installed" ] || { echo "error: nothing is installed; first: install" >&2; exit 1; }
mkdir -p "\$HOME/run"
${ALIVE_SCRIPT}if alive; then
  echo "already running"
  exit 0
fi
$(mount_script)
cd "\$HOME/causalfusion_jax"
export PATH="\$HOME/venv/bin:\$PATH"
rm -f "\$HOME/run/status"
SCRIPT
  # A session of its own, so that it outlives the connection and stop reaches all of it. The shells
  # survive the signal of stop: that of the command starts nothing more once its program has saved, and
  # the outer one records the exit status once all processes, which hold descriptor 3 open, have ended.
  cat <<SCRIPT
cat > "\$HOME/run/command.sh" <<'END_OF_COMMAND'
trap 'exit $INTERRUPTED' TERM
$command
END_OF_COMMAND
setsid bash -c 'trap : TERM
  status="\$(trap : TERM; bash "\$HOME/run/command.sh" 3>&1 >&2; echo \$?)"
  echo "\$status" > "\$HOME/run/status"' > "\$HOME/run/log" 2>&1 < /dev/null &
echo "\$! \$(started \$!) \$(boot_id)" > "\$HOME/run/pid"
SCRIPT
}

# A run without a status was ended by a restart of the machine, which cannot record one.
RUN_STATUS='$(cat "$HOME/run/status" 2> /dev/null || echo '"$INTERRUPTED)"

# The last line is for `logs`.
LOGS_SCRIPT="$ALIVE_SCRIPT"'[ -f "$HOME/run/pid" ] || { echo "error: nothing was started; exit status 1"; exit 1; }
if alive; then tail --pid="$pid" --sleep-interval=0.5 --lines=50 --follow=name --retry "$HOME/run/log"
else tail --lines=50 "$HOME/run/log"; fi
printf "\n%s\n" "the run has ended; exit status '"$RUN_STATUS"'"'

STOP_SCRIPT="$ALIVE_SCRIPT"'if alive; then kill -TERM -- "-$pid"; else echo "not running"; fi'

STATUS_SCRIPT="$ALIVE_SCRIPT"'if alive; then echo "running"; else
echo "not running; exit status '"$RUN_STATUS"'"; fi
tail --lines=1 "$HOME/run/log"'

# --- The subcommands ------------------------------------------------------------------

create() {
  need NAME ZONE PROJECT ACCELERATOR_TYPE RUNTIME_VERSION
  local options=(
    --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION"
  )
  [[ "$SPOT" == 0 ]] || options+=(--spot)
  [[ -z "${SERVICE_ACCOUNT:-}" ]] || options+=(--service-account="$SERVICE_ACCOUNT")
  queued create "${options[@]}"
  wait_until_active
}

install() {
  need NAME ZONE PROJECT
  case "$REPO" in
    *://* | git@*) ;;
    *)
      local archive="${TMPDIR:-/tmp}/causalfusion_jax.tar.gz"
      if [[ "$dry_run" == 0 && -n "$(git -C "$REPO" status --porcelain)" ]]; then
        echo "note: changes in $REPO that are not committed are not installed" >&2
      fi
      run_or_show git -C "$REPO" archive --format=tar.gz --output="$archive" HEAD
      run_or_show gcloud compute tpus tpu-vm scp "$archive" "$NAME:causalfusion_jax.tar.gz" \
        --project="$PROJECT" --zone="$ZONE" --worker=all
      ;;
  esac
  on_workers all "$(install_script)"
}

run() {
  need NAME ZONE PROJECT
  [[ -n "${COMMAND:-}" ]] || need CONFIG WORKDIR
  on_workers all "$(run_script)"
  [[ "$FOLLOW" == 0 ]] || logs
}

logs() {
  need NAME ZONE PROJECT
  if [[ "$dry_run" == 1 ]]; then
    on_workers 0 "$LOGS_SCRIPT"
    return
  fi
  exec 3>&1
  local last
  last="$(on_workers 0 "$LOGS_SCRIPT" | tee /dev/fd/3 | tail -n 1)" || true
  # gcloud has its own exit statuses, including those of a lost connection.
  case "$last" in
    *"; exit status "[0-9]*)
      run_status="${last##* }"
      exit "$run_status"
      ;;
    *) interrupted "the connection to $NAME was lost before the run ended" ;;
  esac
}

stop() {
  need NAME ZONE PROJECT
  on_workers all "$STOP_SCRIPT"
}

# At the end of resume: what failed before the run was started may succeed later.
may_resume() {
  local status=$?
  [[ -n "$run_status" || $status == 0 || $status -gt 128 ]] || exit "$INTERRUPTED"
}

resume() {
  need NAME ZONE PROJECT ACCELERATOR_TYPE RUNTIME_VERSION
  [[ -n "${COMMAND:-}" ]] || need CONFIG WORKDIR
  trap may_resume EXIT
  local state="SUSPENDED"
  if [[ "$dry_run" == 1 ]]; then
    echo "# where it says SUSPENDED:"
    queued describe --format='value(state.state)'
  else
    state="$(tpu_state)"
    echo "$NAME is ${state:-not there}"
  fi
  case "$state" in
    ACTIVE) ;;
    "") create ;;
    SUSPENDED | SUSPENDING | FAILED)
      delete
      create
      ;;
    *) wait_until_active ;;
  esac
  if [[ "$dry_run" == 1 ]] || ! on_workers all 'test -f "$HOME/venv/.installed"'; then
    install
  fi
  run
}

status() {
  need NAME ZONE PROJECT
  queued describe --format='value(state.state)'
  on_workers 0 "$STATUS_SCRIPT"
}

delete() {
  need NAME ZONE PROJECT
  # --force: together with its TPU. Without --quiet it would ask.
  queued delete --force --quiet
}

# --- The command line -----------------------------------------------------------------

default_runtime() {
  case "${ACCELERATOR_TYPE:-}" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
  esac
}

dry_run=0
# How the run ended, if known.
run_status=""
subcommand=""
train_flags=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --)
      shift
      train_flags=("$@")
      break
      ;;
    -h | --help | help)
      usage
      exit 0
      ;;
    --dry_run | --dry-run) dry_run=1 ;;
    --*=*)
      option="${1%%=*}"
      option="$(printf '%s' "${option#--}" | tr '[:lower:]-' '[:upper:]_')"
      [[ " $OPTIONS " == *" $option "* ]] || fail "${1%%=*}: must be one of $OPTIONS, in lower case"
      printf -v "$option" '%s' "${1#*=}"
      ;;
    -*) fail "$1: must be --option=value; see --help" ;;
    *)
      [[ -z "$subcommand" ]] || fail "$1: one subcommand is enough; $subcommand was given"
      subcommand="$1"
      ;;
  esac
  shift
done
[[ -n "$subcommand" ]] || fail "no subcommand: must be one of $SUBCOMMANDS; see --help"
[[ " $SUBCOMMANDS " == *" $subcommand "* ]] || fail "$subcommand: must be one of $SUBCOMMANDS"

: "${SPOT:=1}" "${FOLLOW:=1}" "${RUNTIME_VERSION:=$(default_runtime)}"
: "${REPO:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
for option in SPOT FOLLOW; do
  [[ "${!option}" == [01] ]] || fail "$option=${!option}: must be 0 or 1"
done
[[ "${DATA:-gs://}" == gs://* ]] ||
  fail "DATA=$DATA: must be gs://BUCKET/FOLDER; for a path there, give -- --config.data.path=PATH"
[[ "$dry_run" == 1 ]] || command -v gcloud > /dev/null ||
  fail "gcloud: not found; install the Google Cloud CLI, or give --dry_run"
"$subcommand"
