package main

import (
	"go/ast"
	"path"
	"regexp"
	"slices"
	"testing"
)

func TestNames(t *testing.T) {
	t.Parallel()
	drawers := []string{"util", "utils", "common", "helpers", "shared", "types", "base", "misc"}
	for _, p := range loadTree(t) {
		for _, name := range []string{path.Base(p.path), p.files[0].ast.Name.Name} {
			if slices.Contains(drawers, name) {
				t.Errorf("package %s: a drawer, not a name; say what the package provides", p.path)
			}
		}
	}
}

func TestDocumented(t *testing.T) {
	t.Parallel()
	for _, p := range loadTree(t) {
		if !slices.ContainsFunc(p.files, func(f *srcFile) bool { return f.ast.Doc != nil }) && !p.onlyTests("main") {
			t.Errorf("package %s has no doc comment: say what it does, what it leaves out, and what is known to be wrong", p.path)
		}
		for _, f := range p.files {
			if f.test {
				continue
			}
			for _, d := range f.ast.Decls {
				for _, id := range undocumented(d) {
					t.Errorf("%s: exported %s has no comment: say what the reader of the call needs to know", f.pos(id), id.Name)
				}
			}
		}
	}
}

// undocumented returns the exported names that d declares without a comment.
// A comment on a group of constants or variables covers the group.
func undocumented(d ast.Decl) []*ast.Ident {
	var ids []*ast.Ident
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
			ids = append(ids, d.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if d.Doc == nil && s.Doc == nil && s.Comment == nil && s.Name.IsExported() {
					ids = append(ids, s.Name)
				}
			case *ast.ValueSpec:
				for _, n := range s.Names {
					if d.Doc == nil && s.Doc == nil && s.Comment == nil && n.IsExported() {
						ids = append(ids, n)
					}
				}
			}
		}
	}
	return ids
}

// receiver returns the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	e := d.Recv.List[0].Type
	for {
		switch x := e.(type) {
		case *ast.StarExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.IndexListExpr:
			e = x.X
		case *ast.Ident:
			return x.Name
		default:
			return ""
		}
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	const maxFile, maxBody, longBody = 500, 100, 60
	for _, p := range loadTree(t) {
		for _, f := range p.files {
			if n := f.lines(); n > maxFile && !ast.IsGenerated(f.ast) {
				t.Errorf("%s has %d lines, more than %d: split it by subject", f.path, n, maxFile)
			}
			for _, d := range f.ast.Decls {
				fn, ok := d.(*ast.FuncDecl)
				if !ok || fn.Body == nil {
					continue
				}
				switch n := fset.Position(fn.Body.End()).Line - fset.Position(fn.Body.Pos()).Line - 1; {
				case n > maxBody:
					t.Errorf("%s: %s has a body of %d lines, more than %d: name its steps", f.pos(fn), fn.Name.Name, n, maxBody)
				case n > longBody:
					t.Logf("%s: %s has a body of %d lines; over %d needs a reason in review", f.pos(fn), fn.Name.Name, n, longBody)
				}
			}
		}
	}
}

func TestNoInit(t *testing.T) {
	t.Parallel()
	for _, p := range loadTree(t) {
		for _, f := range p.files {
			for _, d := range f.ast.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" && !f.test {
					t.Errorf("%s: init runs in every role of the binary, on every CNI call: call it from the role that needs it", f.pos(fn))
				}
			}
		}
	}
}

func TestTODOsNameAnIssue(t *testing.T) {
	t.Parallel()
	bare := regexp.MustCompile(`^\W*(TODO|FIXME|XXX|HACK)\b(\(#\d+\))?`)
	for _, p := range loadTree(t) {
		for _, f := range p.files {
			for _, g := range f.ast.Comments {
				for _, c := range g.List {
					if m := bare.FindStringSubmatch(c.Text); m != nil && m[2] == "" {
						t.Errorf("%s: %s without an issue number is forgotten: write TODO(#123)", f.pos(c), m[1])
					}
				}
			}
		}
	}
}
