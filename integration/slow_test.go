//go:build slow

package integration

const slow = true
