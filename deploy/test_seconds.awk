# Passes the output of `cargo test` on, and prints at its end the seconds of every test binary that took one or more.
{ print; fflush() }
/^ +Running / { name = $(NF); gsub(/[()]/, "", name); sub(/.*\//, "", name); sub(/-[0-9a-f]+$/, "", name); from = $(NF - 1); name = name " " from }
/^ +Doc-tests / { name = "doc-tests " $2 }
/^test result: .* finished in / {
  seconds = $NF; sub(/s$/, "", seconds)
  if (seconds >= 1) table = table sprintf("  %-52s %7.1f s\n", name, seconds)
}
END { printf "seconds of test binaries (of one or more):\n%s", table }
