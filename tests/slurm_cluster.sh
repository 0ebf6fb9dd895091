#!/usr/bin/env bash
# A SLURM of its own on this machine, for tests/test_slurm.py: munged, slurmctld and some slurmd,
# without systemd, cgroups or a database. As root.
#   slurm_cluster.sh install                    Debian's slurm-wlm and munge, where they are missing
#   slurm_cluster.sh start FOLDER [NODES] [CPUS]    prints the SLURM_CONF to export; 4 nodes or more:
#      a job of partition high preempts those of low, on n1 and n2; partition beside has the others
#   slurm_cluster.sh stop FOLDER
# Ports are free ones and everything lies in FOLDER, so several may stand side by side. FOLDER must
# be open to the user munge: not below a folder of mode 700.
set -euo pipefail

install() {
  command -v sbatch >/dev/null && command -v slurmctld >/dev/null && command -v munged >/dev/null &&
    return 0
  # A package that starts its service would find no systemd, or a host that has other plans.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
  fi
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    -o DPkg::Lock::Timeout=120 slurm-wlm munge >/dev/null
}

free_ports() { # COUNT
  python3 - "$1" <<'PY'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PY
}

running() { # PIDFILE; a zombie is not: where pid 1 is no init, nobody collects it
  local pid
  [ -s "$1" ] && pid=$(cat "$1") && [ -r "/proc/$pid/stat" ] &&
    [ "$(sed 's/.*) //' "/proc/$pid/stat" | cut -c1)" != Z ]
}

configure() { # NODES CPUS
  local host ports node
  host=$(hostname -s)
  read -ra ports < <(free_ports $((1 + $1)))
  # proctrack/linuxproc, task/none: no cgroups. config_overrides: more CPUs than the machine has.
  # MinJobAge, JobCompType: what became of a job can be asked afterwards without a database.
  cat >"$folder/slurm.conf" <<CONF
ClusterName=nsphere
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/%n.pid
SlurmdSpoolDir=$folder/spool/%n
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
OverTimeLimit=0
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=120
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs.txt
PropagateResourceLimits=NONE
CONF
  for node in $(seq 1 "$1"); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$node]} CPUs=$2"
  done >>"$folder/slurm.conf"
  cat >>"$folder/slurm.conf" <<CONF
PartitionName=low Nodes=n[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n[1-2] State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=beside Nodes=n[3-$1] State=UP PreemptMode=OFF
CONF
}

start() { # [NODES] [CPUS]
  local nodes=${1:-4} cpus=${2:-4} node
  mkdir -p "$folder"/{state,spool,log,run,munge}
  chmod 755 "$folder"
  dd if=/dev/urandom of="$folder/munge/key" bs=1 count=128 status=none
  chmod 400 "$folder/munge/key"
  chown -R munge: "$folder/munge"
  configure "$nodes" "$cpus"
  runuser -u munge -- munged --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld
  for node in $(seq 1 "$nodes"); do
    mkdir -p "$folder/spool/n$node"
    slurmd -N "n$node"
  done
  for _ in $(seq 1 300); do
    if [ "$(sinfo -h -o %t 2>/dev/null | sort -u)" = idle ]; then
      echo "$SLURM_CONF"
      return 0
    fi
    sleep 0.1
  done
  { echo "slurm_cluster.sh: the nodes do not become idle"; sinfo; tail -n 5 "$folder"/log/*; } >&2
  return 1
}

stop() {
  export SLURM_CONF=$folder/slurm.conf
  timeout 10 scancel --user=root 2>/dev/null || true
  local pids=("$folder"/run/n*.pid "$folder/run/slurmctld.pid" "$folder/munge/pid") file environment words
  for file in "${pids[@]}"; do running "$file" && kill "$(cat "$file")" || true; done
  # Nobody wants what a job saves now: this cluster's daemons and all that is in its jobs end at once.
  for environment in /proc/[0-9]*/environ; do
    { words=$(tr '\0' '\n' <"$environment"); } 2>/dev/null || continue
    grep -qx "SLURM_CONF=$SLURM_CONF" <<<"$words" || continue
    file=${environment%/environ}
    if grep -q ^SLURM_JOB_ID= <<<"$words" || grep -qs ^slurm "$file/comm"; then
      kill -KILL "${file#/proc/}" 2>/dev/null || true
    fi
  done
  for _ in $(seq 1 50); do
    for file in "${pids[@]}"; do running "$file" && { sleep 0.1; continue 2; }; done
    return 0
  done
}

action=${1:-}
folder=${2:-}
case $action in
install) install ;;
start | stop)
  [ -n "$folder" ] || { sed -n '2,10s/^# \?//p' "$0"; exit 2; }
  shift 2
  "$action" "$@"
  ;;
*) sed -n '2,10s/^# \?//p' "$0"; exit 2 ;;
esac
