"""Studies of students' explanations with people: design, survey, answers, analysis."""
