#!/usr/bin/env bash
# Downloads Llama 2 models with the signed link from Meta's e-mail. See usage below. Runs on bash 3.2 and newer.
set -u -o pipefail

usage() {
  cat <<'USAGE'
usage: bash download.sh [--url URL] [--models NAMES] [--out DIR] [--list] [--dry-run] [--help]

  --url URL       the signed link from the e-mail, which contains a *; default: LLAMA_URL, else you are asked
  --models NAMES  comma-separated list of 7B,13B,70B,7B-chat,13B-chat,70B-chat, or "all"; you are asked if it is missing
  --out DIR       the folder for the model folders; default: the current folder
  --list          print the models with their folders and sizes
  --dry-run       print the files that would be downloaded, and exit

Each file is downloaded to NAME.part and renamed when it is complete. To resume an interrupted download, run the same
command again, with a new link if the old one has expired. Files with the correct checksum are not downloaded again.

exit status: 0 success, 1 a transfer failed after several attempts, 2 invalid argument or link, 3 a required tool is
missing, 4 not enough disk space, 5 the server refused the link, 6 checksum mismatch, 130 interrupted
USAGE
}

names="7B 13B 70B 7B-chat 13B-chat 70B-chat"
attempts=5                     # per file, without progress
pause=${LLAMA_RETRY_PAUSE:-5}  # seconds between attempts

fail() {
  status=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$status"
}

folder_of() { printf 'llama-2-%s' "$(printf '%s' "$1" | tr 'B' 'b')"; }

shards_of() {
  case $1 in
    7B*) echo 1 ;;
    13B*) echo 2 ;;
    70B*) echo 8 ;;
  esac
}

# The size of a model in megabytes.
size_of() {
  case $1 in
    7B*) echo 13480 ;;
    13B*) echo 26040 ;;
    70B*) echo 137980 ;;
  esac
}

# The files of a model, largest last.
files_of() {
  printf 'checklist.chk\nparams.json\n'
  local shard=0
  while [ "$shard" -lt "$(shards_of "$1")" ]; do
    printf 'consolidated.%02d.pth\n' "$shard"
    shard=$((shard + 1))
  done
}

list() {
  local name
  printf '%-10s %-18s %8s %8s\n' model folder shards size
  for name in $names; do
    printf '%-10s %-18s %8s %5s GB\n' "$name" "$(folder_of "$name")" "$(shards_of "$name")" \
      "$(($(size_of "$name") / 1000))"
  done
}

check_url() {
  case $1 in
    '') fail 2 "no link: pass --url, set LLAMA_URL, or paste the link from the e-mail when asked" ;;
    *l.facebook.com/* | *lm.facebook.com/* | *l.php\?u=*)
      fail 2 "this link is the e-mail program's wrapper around Meta's link: copy the link's text, not its address" ;;
    http://* | https://*) ;;
    *) fail 2 "the link does not begin with https://: copy all of it from the e-mail" ;;
  esac
  case $1 in
    *[[:space:]]*) fail 2 "the link has spaces or line breaks in it: copy it as one line" ;;
    *\**) ;;
    *) fail 2 "the link has no * in it: copy the one that has a *, which stands for each file's name" ;;
  esac
}

# Prints the chosen names, one per line.
check_models() {
  local given name
  given=$(printf '%s' "$1" | tr ',' ' ')
  if [ "$1" = all ]; then
    given=$names
  fi
  if [ -z "${given// /}" ]; then
    fail 2 "no models: pass --models"
  fi
  for name in $given; do
    case " $names " in
      *" $name "*) printf '%s\n' "$name" ;;
      *) fail 2 "unknown model '$name': use ${names// /, }" ;;
    esac
  done | sort -u
}

# Prints the first of two programs that is installed.
either() {
  local tool
  for tool in "$1" "$2"; do
    if command -v "$tool" >/dev/null 2>&1; then
      printf '%s' "$tool"
      return
    fi
  done
  fail 3 "neither $1 nor $2 is installed: install one of them"
}

md5_of() {
  if [ "$hasher" = md5sum ]; then md5sum <"$1" | cut -c 1-32; else md5 -q "$1"; fi
}

kilobytes_in() { if [ -e "$1" ]; then du -sk "$1" | cut -f 1; else echo 0; fi; }

check_space() {
  local name needed=0 there=0 free
  for name in $models; do
    needed=$((needed + $(size_of "$name") * 1000))
    there=$((there + $(kilobytes_in "$out/$(folder_of "$name")")))
  done
  free=$(df -Pk "$out" | awk 'NR == 2 { print $4 }')
  if [ "$((needed - there))" -gt "$free" ]; then
    fail 4 "$out has $((free / 1000000)) GB free, and $(((needed - there) / 1000000)) GB are still needed:" \
      "choose another --out or fewer --models"
  fi
}

bytes_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# transfer URL PART: appends the missing bytes to PART. Sets `code` and `type` to the response's status and content
# type. Returns the client's exit status.
transfer() {
  local arguments
  if [ "$client" = curl ]; then
    arguments=(--globoff --location --fail --continue-at - --connect-timeout 30 --speed-limit 1 --speed-time 60
      --output "$2" --write-out '%{http_code} %{content_type}')
    if [ -t 2 ]; then arguments+=(--progress-bar); else arguments+=(--silent); fi
    curl "${arguments[@]}" -- "$1" >"$log" &
  else
    arguments=(--continue --tries=1 --connect-timeout=30 --read-timeout=60 --server-response "--output-file=$log"
      "--output-document=$2")
    if [ -t 2 ]; then arguments+=(--show-progress); fi
    wget "${arguments[@]}" -- "$1" &
  fi
  # The client runs in the background: otherwise bash would not handle a signal until the transfer ends.
  child=$!
  wait "$child"
  local result=$?
  child=
  if [ "$client" = curl ]; then
    read -r code type <"$log"
  else
    code=$(awk '/^ *HTTP\// { code = $2 } END { print code }' "$log")
    type=$(awk 'tolower($1) == "content-type:" { type = $2 } END { print type }' "$log")
  fi
  return "$result"
}

web_page() {
  fail 5 "the server sent a web page in place of $1: the link has expired or is not a download link; request a new one"
}

# fetch REMOTE LOCAL [MD5]: returns when LOCAL is complete, else exits.
fetch() {
  local part="$2.part" tries=0 most=0 result before got
  if [ -f "$2" ]; then
    if [ -z "${3:-}" ] || [ "$(md5_of "$2")" = "$3" ]; then
      return
    fi
    rm -f "$2"
  fi
  echo "fetching $1" >&2
  while true; do
    before=$(bytes_of "$part")
    if [ -n "${3:-}" ] && [ "$before" -gt 0 ] && [ "$(md5_of "$part")" = "$3" ]; then
      break
    fi
    transfer "${url/\*/$1}" "$part"
    result=$?
    case $code$type in
      20?text/html*)
        if [ "$before" -eq 0 ]; then rm -f "$part"; fi  # else it has an earlier run's data
        web_page "$1" ;;
    esac
    if [ "$result" -eq 0 ] && [ "$code" != 416 ]; then
      break
    fi
    case $code in
      403) fail 5 "the server refuses $1 (403): the link has expired, which it does after 24 hours or several" \
        "downloads, or is for another family of models; request a new one and run this again" ;;
      416) rm -f "$part" ;;  # no bytes follow the part, but it is not known to be complete
      408 | 429) ;;
      4*) fail 5 "the server has no $1 ($code): the link is for another family of models" ;;
    esac
    case $client$result in
      curl33) rm -f "$part" ;;  # the server cannot resume
      curl23 | wget3) fail 4 "$part could not be written: is the disk full? Run the same command again to resume" ;;
    esac
    before=$(bytes_of "$part")
    if [ "$before" -gt "$most" ]; then most=$before tries=0; fi
    tries=$((tries + 1))
    if [ "$tries" -ge "$attempts" ]; then
      fail 1 "$1 could not be fetched (status ${code:-none}) in $attempts attempts: check the connection, and run the" \
        "same command again to resume"
    fi
    sleep "$pause"
  done
  if head -c 512 "$part" | grep -qi -e '<html' -e '<!doctype' -e '<?xml'; then
    rm -f "$part"
    web_page "$1"
  fi
  if [ -n "${3:-}" ]; then
    got=$(md5_of "$part")
    if [ "$got" != "$3" ]; then
      rm -f "$part"
      fail 6 "$1 has MD5 $got, but $3 is expected: it was removed; run the same command again to download it"
    fi
  fi
  mv "$part" "$2" || fail 4 "$part could not be moved to $2"
}

would_fetch() { if [ ! -f "$2" ]; then printf '%s -> %s\n' "$1" "$2"; fi; }

# Prints a file's MD5 from a checklist.
expected() {
  local sum
  sum=$(awk -v name="$2" '{ sub(/^\*/, "", $2); if ($2 == name) print $1 }' "$1")
  if [ -z "$sum" ]; then
    rm -f "$1"
    fail 6 "${1##*/} has no checksum for $2: it was removed; run the same command again to download it"
  fi
  printf '%s' "$sum"
}

fetch_all() {
  local name folder file sum
  # Use separate names, so that a project's own LICENSE is not overwritten.
  fetch LICENSE "$out/LLAMA-2-LICENSE"
  fetch USE_POLICY.md "$out/LLAMA-2-USE_POLICY.md"
  fetch tokenizer_checklist.chk "$out/tokenizer_checklist.chk"
  sum=$(expected "$out/tokenizer_checklist.chk" tokenizer.model) || exit
  fetch tokenizer.model "$out/tokenizer.model" "$sum"
  for name in $models; do
    folder=$(folder_of "$name")
    mkdir -p "$out/$folder" || fail 4 "$out/$folder cannot be created: choose another --out"
    for file in $(files_of "$name"); do
      sum=
      if [ "$file" != checklist.chk ]; then
        sum=$(expected "$out/$folder/checklist.chk" "$file") || exit
      fi
      fetch "$folder/$file" "$out/$folder/$file" "$sum"
    done
    echo "$folder is whole" >&2
  done
}

url=${LLAMA_URL:-}
models=
models_given=
out=.
dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --url | --models | --out)
      if [ $# -lt 2 ]; then fail 2 "$1 needs a value: see --help"; fi
      case $1 in
        --url) url=$2 ;;
        --models) models=$2 models_given=1 ;;
        --out) out=$2 ;;
      esac
      shift 2 ;;
    --list) list && exit ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit ;;
    *) fail 2 "unknown argument '$1': see --help" ;;
  esac
done

if [ -z "$url" ]; then
  printf 'Paste the link from the e-mail: ' >&2
  read -r url || true
fi
check_url "$url"
if [ -z "$models_given" ]; then
  printf 'Models, comma-separated, from %s; Enter for all: ' "${names// /,}" >&2
  read -r models || fail 2 "no models: pass --models"
  models=${models:-all}
fi
models=$(check_models "$models") || exit
client=$(either curl wget) || exit
hasher=$(either md5sum md5) || exit

if [ -n "$dry_run" ]; then
  would_fetch LICENSE "$out/LLAMA-2-LICENSE"
  would_fetch USE_POLICY.md "$out/LLAMA-2-USE_POLICY.md"
  would_fetch tokenizer_checklist.chk "$out/tokenizer_checklist.chk"
  would_fetch tokenizer.model "$out/tokenizer.model"
  for name in $models; do
    for file in $(files_of "$name"); do
      would_fetch "$(folder_of "$name")/$file" "$out/$(folder_of "$name")/$file"
    done
  done
  exit
fi

mkdir -p "$out" || fail 4 "$out cannot be created: choose another --out"
check_space
child=
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'if [ -n "$child" ]; then kill "$child" 2>/dev/null; fi
  echo "stopped: run the same command again to resume" >&2; exit 130' INT TERM
fetch_all
