# What a build prints, made short: a file a line instead of a command of a thousand characters.
# Compiler warnings and errors pass as they are.

/^\[[0-9]+\/[0-9]+\] / && / -c / {
  source = $0
  sub(/.* -c /, "", source)
  sub(/ .*/, "", source)
  sub(/.*\/csrc\//, "csrc/", source)
  print $1, source
  fflush()
  next
}

# The Python traceback after a failed compilation says nothing the compiler has not said.
/^ninja: build stopped/ { print; stopped = 1 }

# Patterns of MANIFEST.in that match nothing yet.
/^warning: no (previously-included )?files / { next }

stopped || /^ninja: / || /^Emitting ninja build file/ || /^Compiling objects/ || /^Using envvar MAX_JOBS/ { next }

{ print; fflush() }
