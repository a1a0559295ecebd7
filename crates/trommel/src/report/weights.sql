-- The five largest weights of each domain. Columns in: `weights`, `clusters`. Columns out: domain, cluster_id, weight,
-- p_domain, p_corpus, epochs, top_terms; the largest weight first.
WITH ranked AS (
    SELECT w.*, c.top_terms, row_number() OVER (PARTITION BY w.domain ORDER BY w.weight DESC, w.cluster_id) AS place
    FROM weights AS w JOIN clusters AS c ON c.cluster_id = w.cluster_id
    WHERE w.weight > 0
)
SELECT domain, cluster_id, weight, p_domain, p_corpus, epochs, top_terms FROM ranked WHERE place <= 5 ORDER BY domain, place
