package main

import (
	"bytes"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSummary(t *testing.T) {
	var out bytes.Buffer
	require.True(t, run(&out, 1, 3, false))
	require.Contains(t, out.String(), "3 seeds, 0 failed")
}

func TestFailureSaysHowToRepeatIt(t *testing.T) {
	var out bytes.Buffer
	report(&out, 7, errors.New("two live sides"), false)
	require.Contains(t, out.String(), "seed 7: two live sides\n")
	require.Regexp(t, `(?m)^ +\d+ [AB]: send Released to #\d+$`, out.String(), "the end of the transcript")
	require.Contains(t, out.String(), "to repeat: ./build.sh sim --seed 7 --trace\n")
}
