-- What was drawn, per domain and cluster. A copy after the first one repeats a window.
-- in:  draws(domain, cluster_id, copy, text, ...)
-- out: domain, cluster_id, draws, repeats
SELECT domain, cluster_id, count(*) AS draws, sum(CASE WHEN copy > 0 THEN 1 ELSE 0 END) AS repeats
FROM draws GROUP BY domain, cluster_id
