#!/bin/bash
# What `mptcp-hook oci` does at a container's start, as a shell script: the yardstick of benches/run. It starts as few
# programs as it can: jq for the state, flock, nsenter, one ip that reads everything, one that changes, reads back and
# looks the routes up, and mv.
#
#   baseline.sh STATE_DIR SYSCTL=VALUE   the container's OCI state on standard input; SYSCTL is the whole host's
set -eu

die() {
  echo "baseline.sh: $id: $1" >&2
  exit "${2:-1}"
}

# set_sysctl FILE VALUE: writes and reads back, if it is not as wished already. Sets `before`.
set_sysctl() {
  local after
  read -r before <"$1"
  [ "$before" != "$2" ] || return 0
  echo "$2" >"$1"
  read -r after <"$1"
  [ "$after" = "$2" ] || die "$1 was written as $2 and reads back as $after"
}

# In the container's network namespace: inside ID SYSCTL=VALUE INTERFACE "FLAG FLAG..." [INTERFACE FLAGS]...
# Prints what is in force afterwards.
inside() {
  local facts line field address changes='' expected=() lookups='' found now present=' '
  id=$1 file=/proc/sys/${2%%=*} before='' added=' ' limits=()
  local value=${2#*=}
  shift 2
  facts=$(ip -o -batch - <<<$'addr show scope global\nmptcp endpoint show\nmptcp limits show')
  while read -ra field; do
    case ${field[0]} in
      add_addr_accepted) limits=(subflows "${field[3]}" add_addr_accepted "${field[1]}") ;;
      *:) ;;
      *) present+="${field[0]} " ;;
    esac
  done <<<"$facts"

  while [ $# -gt 0 ]; do
    while read -ra field; do
      [[ ${field[1]} = "$1" && ${field[2]} = inet* ]] || continue
      address=${field[3]%/*}
      expected+=("$address $2 dev $1")
      lookups+="route get 192.0.2.1 from $address oif $1"$'\n'
      # One that is there already is not ours to change; whether it is as wished is seen below.
      [[ $present = *" $address "* ]] && continue
      added+="$address "
      changes+="mptcp endpoint add $address dev $1 $2"$'\n'
    done <<<"$facts"
    shift 2
  done
  if [ ${#expected[@]} -gt "${limits[1]}" ]; then
    changes="mptcp limits set subflows ${#expected[@]} add_addr_accepted ${limits[3]}"$'\n'$changes
  fi

  trap undo EXIT
  set_sysctl "$file" "$value"
  now=$(ip -o -batch - <<<"${changes}mptcp endpoint show"$'\n'"mptcp limits show"$'\n'"$lookups")
  found=$'\n'
  while read -ra field; do
    case ${field[0]-} in
      '') ;;
      add_addr_accepted) [ "${field[3]}" -ge ${#expected[@]} ] || die "the limit of subflows reads back as ${field[3]}" ;;
      192.0.2.1) [ "${field[3]}" = via ] || echo "baseline.sh: $id: no route out from ${field[2]}" >&2 ;;
      *) found+="${field[0]} ${field[*]:3}"$'\n' ;; # without "id N"
    esac
  done <<<"$now"
  for line in "${expected[@]}"; do
    [[ $found = *$'\n'"$line"$'\n'* ]] || die "the kernel does not list the endpoint $line"
  done
  trap - EXIT
  echo "$now"
}

undo() {
  local address number
  [ -z "$before" ] || echo "$before" >"$file"
  ip -o mptcp endpoint show | while read -r address _ number _; do
    [[ $added != *" $address "* ]] || ip mptcp endpoint delete id "$number"
  done
  ip mptcp limits set "${limits[@]}"
}

if [ "$1" = inside ]; then
  shift
  inside "$@"
  exit
fi

directory=$1 key=${2%%=*} value=${2#*=}
id=container pid='' sysctl='' wishes=()
eval "$(jq -r '
  def prefixed(p): .annotations | to_entries[] | select(.key | startswith(p)) | .key |= .[p | length:];
  def words: if . == "backup" then "subflow backup" else gsub(","; " ") end;
  @sh "id=\(.id) pid=\(.pid)",
  @sh "wishes=(\([prefixed("mptcp-hook/interface.") | .key, (.value | words)]))",
  @sh "sysctl=\([prefixed("mptcp-hook/sysctl.") | "\(.key | gsub("\\."; "/"))=\(.value)"] | first)"
')"
[ -e "/proc/$pid/ns/net" ] || die "there is no process $pid"

[ -d "$directory/claims" ] || mkdir -p "$directory/claims" "$directory/containers"
exec 9>"$directory/lock"
flock -w 5 9

# The host's value is shared if it is as wished, and written only if nobody relies on another one.
file=/proc/sys/$key
read -r present <"$file"
if [ "$present" != "$value" ]; then
  for claim in "$directory/claims"/*; do
    [ ! -e "$claim" ] || die "$key = $value: ${claim##*/} relies on $present" 3
  done
  set_sysctl "$file" "$value"
fi

result=$(nsenter --net="/proc/$pid/ns/net" "$0" inside "$id" "$sysctl" "${wishes[@]}")

echo "$value" >"$directory/claims/$id"
printf '%s\n' "$id $pid" "$sysctl" "$result" >"$directory/.tmp-$id"
mv "$directory/.tmp-$id" "$directory/containers/$id"
