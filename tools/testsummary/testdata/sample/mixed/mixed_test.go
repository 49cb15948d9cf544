package mixed

import "testing"

func TestPass(t *testing.T) {}

func TestFail(t *testing.T) {
	t.Log("what the failing test said")
	t.Error("and why it failed")
}

func TestSkip(t *testing.T) { t.Skip("needs a GPU") }

func TestSubs(t *testing.T) {
	t.Run("good", func(t *testing.T) {})
	t.Run("bad", func(t *testing.T) { t.Error("one subtest fails") })
}

func TestParentFails(t *testing.T) {
	t.Run("good", func(t *testing.T) {})
	t.Error("the parent fails by itself")
}
