#!/usr/bin/env bash
# Build the image as the Dockerfile says and start what is in it, without an engine and without a registry of images.
#
# For root, who may mount and chroot; `apt-get install buildah curl debootstrap iproute2`; some three minutes. The base python:3.13-slim
# is Debian 13 with its Python 3.13; a Debian 13 with its own Python 3.13, made here, stands in for it. What is started
# is process 1 of namespaces of its own, as the image's user, on a root file system that is read-only. It must answer an id,
# be found healthy by the image's own check, and exit with status 0 on SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."

there=$(mktemp -d)
mounted=
program=
end() {
  [ -z "$program" ] || kill -KILL "$program" 2>/dev/null || true
  [ -z "$mounted" ] || "${buildah[@]}" umount --all >/dev/null
  rm -rf "$there"
}
trap end EXIT

buildah=(buildah --root "$there/storage" --runroot "$there/run" --storage-driver vfs)
export BUILDAH_ISOLATION=chroot

echo "+ a base: Debian 13 with Python"
base=$there/base
timeout 900 debootstrap --variant=minbase --include=ca-certificates,python-is-python3,python3-pip trixie "$base" >"$there/log" ||
  { tail -5 "$there/log"; exit 1; }
rm "$base"/usr/lib/python3*/EXTERNALLY-MANAGED               # pip may install for all, as in python:3.13-slim
cp /etc/ssl/certs/ca-certificates.crt "$base/etc/ssl/certs/" # whom this machine trusts
empty=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$empty" "$base" / >/dev/null
"${buildah[@]}" commit --quiet --rm "$empty" docker.io/library/python:3.13-slim >/dev/null
rm -rf "$base"

echo "+ the image"
timeout 600 "${buildah[@]}" build --format docker --isolation chroot --network host --pull-never --tag myapp .

container=$("${buildah[@]}" from --pull-never myapp)
mounted=$("${buildah[@]}" mount "$container")
python3 - "$("${buildah[@]}" inspect --type image myapp)" >"$there/words" <<'END'
import json, shlex, sys
config = json.loads(sys.argv[1])["Docker"]["config"]
print("user=" + config["User"])
print("folder=" + config["WorkingDir"])
print("env=(" + shlex.join(config["Env"]) + ")")
print("entry=(" + shlex.join(config["Entrypoint"]) + ")")
print("check=(" + shlex.join(config["Healthcheck"]["Test"][1:]) + ")")
print("signal=" + config["StopSignal"])
END
cat "$there/words"
source "$there/words"
inside=(chroot --userspec="$user" "$mounted" /usr/bin/env -i --chdir="$folder" "${env[@]}")

echo "+ what is in it"
find "$mounted$folder" -type f -printf '%M %U:%G %P\n' | sort -k 3
"${inside[@]}" python --version
"${inside[@]}" python -m pip --no-cache-dir list

echo "+ the program"
# shellcheck disable=SC2016
unshare --mount --net --pid --fork --kill-child=KILL sh -euc '
  ip link set lo up
  mount --bind "$1" "$1"
  mount --options remount,bind,ro "$1"
  mount --types proc proc "$1/proc"
  shift
  exec "$@"' sh "$mounted" "${inside[@]}" "${entry[@]}" --window 86400 2>"$there/program.log" &
program=$!
for _ in $(seq 100); do
  grep -q "listening on" "$there/program.log" && break
  kill -0 "$program" || { cat "$there/program.log"; exit 1; }
  sleep 0.1
done
first=$(cat "/proc/$program/task/$program/children")
first=${first% }
with=(nsenter --target "$first" --net)
answer=$("${with[@]}" curl --silent --max-time 5 'http://127.0.0.1:8080/api/verve/accept?id=7')
health=$("${with[@]}" "${inside[@]}" "${check[@]}")
grep -E '^(Name|Uid|NSpid|CapEff)' "/proc/$first/status"
kill -s "$signal" "$first"
status=0
wait "$program" || status=$?
program=
cat "$there/program.log"
echo "answered: $answer; healthy: $health; exit status: $status"
[ "$answer" = ok ] && [ "$health" = ready ] && [ "$status" = 0 ] && grep -q "unique ids in .*: 1" "$there/program.log"
echo "1 passed, 0 failed"
