package nic

import "fmt"

// maxTypos is the largest distance at which a key is offered as the one that was meant.
const maxTypos = 3

// nearest returns ` (did you mean "x"?)` for the candidate that is the fewest edits away,
// or "" if all are far.
func nearest(word string, candidates []string) string {
	best, bestAt := "", maxTypos+1
	for _, c := range candidates {
		// A word of which nothing remains is no typo.
		if d := distance(word, c); d < bestAt && d < len(c) {
			best, bestAt = c, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// distance returns the Levenshtein distance in bytes, or maxTypos+1 if it is larger than maxTypos.
func distance(a, b string) int {
	if len(a)-len(b) > maxTypos || len(b)-len(a) > maxTypos {
		return maxTypos + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return min(row[len(b)], maxTypos+1)
}
